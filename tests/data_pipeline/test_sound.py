"""Sounds as log-mel frames: Whisper's own numbers, any rate and format, and nothing trusted."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from data_pipeline.errors import DataError
from data_pipeline.sound import LOUDEST, AudioTransform, decode_sound, mel_filters
from data_pipeline.transforms import sample_generator

RATE = 16_000
SILENT = 160  # samples a frame


def encoded(wave: np.ndarray, rate: int = RATE, kind: str = "FLAC", depth: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=kind, subtype=depth)
    return file.getvalue()


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, samples).astype(np.float32)


def tone(hertz: float, rate: int, seconds: float = 0.5) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def test_the_filters_are_those_of_whisper() -> None:
    """Numbers from openai-whisper 20250625, whisper/assets/mel_filters.npz, mel_80 and mel_128."""
    filters = mel_filters(RATE, 400, 80)
    assert filters.shape == (80, 201)
    assert filters.max() == pytest.approx(0.025880685, abs=1e-8)
    assert filters[0, :3] == pytest.approx([0, 0.02486259, 0], abs=1e-8)
    assert filters[40].max() == pytest.approx(0.0147355655, abs=1e-8)
    assert mel_filters(RATE, 400, 128)[0, :3] == pytest.approx([0, 0.01237399, 0], abs=1e-8)


@pytest.mark.parametrize("seconds", [1.0, 3.0])
def test_frames_are_those_of_whisper(seconds: float) -> None:
    """Its log_mel_spectrogram, line by line, on the same filters; of 2 s, which the sound fills or does not."""
    wave = noise(round(seconds * RATE))
    frames, valid = AudioTransform(frames=200)(encoded(wave, kind="WAV", depth="FLOAT"), None)
    padded = torch.nn.functional.pad(torch.from_numpy(wave[: 2 * RATE]), (0, max(0, 2 * RATE - len(wave))))
    spectrum = torch.stft(padded, 400, 160, window=torch.hann_window(400), return_complex=True)
    mel = torch.from_numpy(mel_filters(RATE, 400, 80)) @ spectrum[..., :-1].abs() ** 2
    log = torch.clamp(mel, min=1e-10).log10()
    expected = (torch.maximum(log, log.max() - 8.0) + 4.0) / 4.0
    assert frames.dtype == np.float32
    assert frames.flags.c_contiguous
    np.testing.assert_allclose(frames, expected.numpy().T, atol=1e-5)
    assert valid == min(200, seconds * 100)


def test_a_sound_is_the_same_in_every_format() -> None:
    wave = np.round(noise(8000) * 32767).astype(np.int16)
    transform = AudioTransform(frames=50)
    flac, _ = transform(encoded(wave, kind="FLAC", depth="PCM_16"), None)
    for depth in ("PCM_16", "PCM_24", "PCM_32"):
        assert np.array_equal(transform(encoded(wave, kind="WAV", depth=depth), None)[0], flac), depth
    for depth in ("VORBIS", "OPUS"):
        lossy, valid = transform(encoded(tone(1000, RATE), kind="OGG", depth=depth), None)
        clean, _ = transform(encoded(tone(1000, RATE)), None)
        assert valid == 50
        assert lossy[10:40].mean(axis=0).argmax() == clean[10:40].mean(axis=0).argmax(), depth


def test_channels_are_mixed() -> None:
    wave = np.round(noise(4000) * 32768) / 32768
    both, rate = decode_sound(encoded(np.stack([wave, wave / 2], axis=1), 22_050, "WAV", "FLOAT"))
    assert rate == 22_050
    np.testing.assert_allclose(both, 0.75 * wave, atol=1e-7)
    opposite, _ = decode_sound(encoded(np.stack([wave, -wave], axis=1)))
    assert not opposite.any()


@pytest.mark.parametrize("rate", [8000, 11_025, 22_050, 22_254, 44_100, 48_000, 96_000, 383_987])
def test_any_rate_becomes_the_wanted_one(rate: int) -> None:
    transform = AudioTransform(frames=50)
    frames, valid = transform(encoded(tone(1000, rate), rate, "WAV", "FLOAT"), None)
    expected, _ = transform(encoded(tone(1000, RATE), kind="WAV", depth="FLOAT"), None)
    assert valid == 50
    loud = expected > expected.max() - 0.5  # two decades below the tone; further down is the filter's own doing
    loud[:3] = loud[-3:] = False  # it rings where the tone is cut off
    assert loud.sum() > 100
    assert np.abs(frames - expected)[loud].max() < 0.01


def test_what_the_wanted_rate_cannot_hold_is_gone() -> None:
    """A tone of 13 kHz would fold over to 3 kHz."""
    transform = AudioTransform(frames=50)
    both = tone(500, 48_000) + tone(13_000, 48_000)
    frames, _ = transform(encoded(both / 2, 48_000, "WAV", "FLOAT"), None)
    low, _ = transform(encoded(tone(500, 48_000) / 2, 48_000, "WAV", "FLOAT"), None)
    folded = int(transform(encoded(tone(3000, RATE)), None)[0][25].argmax())
    assert frames[25, folded] < frames[25].max() - 1.25  # 50 dB
    assert frames[25].argmax() == low[25].argmax()


def test_a_short_sound_is_followed_by_silence() -> None:
    transform = AudioTransform(frames=100)
    frames, valid = transform(encoded(noise(20 * SILENT + 1)), None)
    assert frames.shape == (100, 80)
    assert valid == 21
    silence = frames.max() - 2  # eight decades of four a unit
    np.testing.assert_allclose(frames[24:], silence, atol=1e-6)
    assert (frames[:20].max(axis=1) > silence + 1).all()
    assert transform(encoded(noise(1)), None)[1] == 1
    frames, valid = transform(encoded(np.zeros(1600)), None)
    assert valid == 10
    np.testing.assert_allclose(frames, -1.5, atol=1e-6)  # log10 of the floor, 1e-10


def test_of_a_long_sound_training_draws_a_stretch() -> None:
    wave = np.round(noise(44_100) * 32768) / 32768
    transform, data = AudioTransform(frames=30), encoded(wave, 44_100)
    kept = 13_230  # samples of 0.3 s
    beginning, valid = transform(data, None)
    assert valid == 30
    assert np.array_equal(beginning, transform(encoded(wave[:kept], 44_100), None)[0])
    starts = set()
    for epoch in range(20):
        frames, valid = transform(data, sample_generator(7, epoch, 3, "sound"))
        start = int(sample_generator(7, epoch, 3, "sound").integers(len(wave) - kept + 1))
        assert valid == 30
        assert np.array_equal(frames, transform(encoded(wave[start : start + kept], 44_100), None)[0])
        starts.add(start)
    assert len(starts) == 20
    assert min(starts) < 8000
    assert max(starts) > 22_000
    short = encoded(wave[:kept], 44_100)
    assert np.array_equal(transform(short, sample_generator(7, 0, 3, "sound"))[0], transform(short, None)[0])


def test_a_transform_travels() -> None:
    transform, data = AudioTransform(frames=20, rate=8000, window=0.032, hop=0.016, mels=40), encoded(noise(9000))
    there = pickle.loads(pickle.dumps(transform))
    assert there == transform
    assert np.array_equal(there(data, None)[0], transform(data, None)[0])
    assert there(data, None)[0].shape == (20, 40)


# --- what is refused


def flac_that_claims(samples: int) -> bytes:
    """The header's count of samples (36 bits) is another: RFC 9639, section 8.2."""
    data = bytearray(encoded(noise(1000)))
    data[21] = data[21] & 0xF0 | samples >> 32
    data[22:26] = (samples & 0xFFFFFFFF).to_bytes(4, "big")
    return bytes(data)


def wav_with(**header: int) -> bytes:
    """A WAV file whose header says something else."""
    data = bytearray(encoded(noise(1000), kind="WAV", depth="PCM_16"))
    places = {"riff": 4, "rate": 24, "data": 40}
    for name, value in header.items():
        data[places[name] : places[name] + 4] = value.to_bytes(4, "little")
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a FLAC, WAV or OGG sound"),
        (b"<html>404</html>", "not a FLAC, WAV or OGG sound .16 bytes"),
        (b"ID3\x04" + bytes(100), "not a FLAC"),
        (b"fLaC" + bytes(100), "damaged FLAC"),
        (b"RIFF\x00\x00\x00\x00WAVE", "damaged WAV"),
        (b"OggS" + bytes(100), "damaged OGG"),
        (encoded(np.zeros(0), kind="OGG"), "the OGG holds no sound"),
        (encoded(np.zeros(0), kind="WAV"), "the WAV holds no sound"),
        (encoded(np.full(100, np.nan), kind="WAV", depth="FLOAT"), "no sound .not finite"),
        (encoded(np.full(100, np.inf), kind="WAV", depth="FLOAT"), "no sound .not finite"),
        (encoded(np.full(100, 2 * LOUDEST), kind="WAV", depth="FLOAT"), "no sound .not finite, or beyond 1000000"),
        (encoded(np.zeros((10, 33)), kind="WAV"), "33 channels, over the limit of 32"),
        (encoded(noise(100), 1000), "a sound of 1000 samples a second: from 2000 to 384000"),
        (wav_with(rate=2**31 - 1), "a sound of 2147483647 samples a second"),
        (wav_with(rate=0), "damaged WAV: "),
        (flac_that_claims(2**36 - 1), "a sound of 68719476735 samples in 1 channels, over the limit of 64000000"),
        (flac_that_claims(60_000_000), "damaged FLAC: "),
        (flac_that_claims(0), "the FLAC does not say how long it is: encode it into a file"),
    ],
)
def test_what_is_no_sound_is_one_sentence(data: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        AudioTransform(frames=10)(data, None)
    assert "\n" not in str(caught.value)
    assert "0x" not in str(caught.value), "the same words in every process"


def test_too_long_is_refused_before_decoding() -> None:
    data = encoded(np.zeros((600, 2)))
    assert len(decode_sound(data, max_samples=1200)[0]) == 600
    with pytest.raises(DataError, match="600 samples in 2 channels, over the limit of 1199 in all: refused"):
        decode_sound(data, max_samples=1199)


@pytest.mark.parametrize(("kind", "depth"), [("FLAC", None), ("WAV", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS")])
def test_a_file_that_ends_early(kind: str, depth: str | None) -> None:
    data = encoded(noise(RATE), kind=kind, depth=depth)
    assert len(decode_sound(data)[0]) >= RATE
    for cut in (1, 30, 500, len(data) // 2, len(data) - 100):
        with pytest.raises(DataError, match=f"damaged {kind}"):
            decode_sound(data[:-cut])


def test_a_streamed_wav_does_not_know_its_length() -> None:
    """ffmpeg writes 2^32 - 1 into a pipe, sox 2^31 - 1 and a little less."""
    for length in (2**32 - 1, 2**31 - 1, 2**31 - 1 - 36):
        assert len(decode_sound(wav_with(riff=length, data=length))[0]) == 1000
    with pytest.raises(DataError, match="it ends early"):
        decode_sound(wav_with(riff=3000, data=2964))


@pytest.mark.parametrize(("kind", "depth"), [("FLAC", None), ("WAV", "FLOAT"), ("OGG", "VORBIS"), ("OGG", "OPUS")])
def test_flipped_bytes_are_a_sound_or_a_data_error(kind: str, depth: str | None) -> None:
    data = encoded(noise(3000), kind=kind, depth=depth)
    transform, generator = AudioTransform(frames=10), np.random.default_rng(5)
    refused = 0
    for _ in range(100):
        flipped = bytearray(data)
        for place in generator.integers(0, min(len(data), 400), 3):
            flipped[place] = generator.integers(256)
        try:
            frames, _ = transform(bytes(flipped), None)
        except DataError:
            refused += 1
        else:
            assert np.isfinite(frames).all()
    assert refused > 5


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"frames": 0}, "frames is 0 and mels 80"),
        ({"mels": 0}, "frames is 3000 and mels 0"),
        ({"rate": 0}, "rate is 0: give 2000 to 384000"),
        ({"hop": 0.0}, "hop 0.0 s: give 0 < hop <= window"),
        ({"hop": 0.03}, "window is 0.025 s and hop 0.03 s"),
        ({"mels": 200}, "mels is 200: more than a window of 0.025 s tells apart"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        AudioTransform(**settings)
