"""Bytes to log-mel frames: FLAC, WAV and OGG to float32 [frames, mels], as Whisper hears them.

    transform = AudioTransform(frames=300)      # three seconds
    frames, valid = transform(data, None)       # valid: how many frames hold sound, the rest being silence

The way of a sound: bytes -> wave at its own rate, mixed to mono -> crop -> wanted rate -> power spectrum -> mel -> log.
    spectrum   |FFT of 25 ms under a Hann window|^2, every 10 ms, the first window centred on the first sample
    mel        triangles evenly spaced on Slaney's scale, each of area 1: mel(f) = 3 f / 200 up to 1 kHz, above it
               15 + 27 ln(f / 1000) / ln 6.4 (Slaney 1998, "Auditory Toolbox" version 2; the default of librosa)
    log        l = log10(max(mel, 1e-10)); l = max(l, max(l) - 8), eight decades below the loudest; (l + 4) / 4
Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision", section 2.2, and its `audio.py`.

Design choices:
- The bytes say what they are; the field's name is not asked. Size comes from the header before a sample is decoded.
- A file that ends early is an error where its format can tell: half a sentence is no match for its transcript.
- Crop first, at the file's own rate: only what is kept is resampled.
- numpy and scipy, which use one thread here: frames are to be the same, to the last bit, in a worker or an actor that
  has one thread and in a trainer that has many. torch makes no such promise for products of matrices.
- Nothing of the package imports this module but whoever wants sound: scipy.signal takes long to load.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
import soundfile
from scipy.fft import rfft
from scipy.signal import resample_poly
from scipy.signal.windows import hann
from scipy.sparse import csr_array

from data_pipeline.errors import DataError, first_bytes, first_line

MAX_SAMPLES = 64e6  # over all channels: 22 minutes at 48 kHz, 256 MB decoded
MAX_CHANNELS = 32
RATES = (2_000, 384_000)  # samples a second
LOUDEST = 1e6  # full scale is 1; WAV files of floats go beyond, those that keep integers as floats to 32768
FINEST = (
    1000  # denominator of a resampling ratio: exact for every usual rate, and no odd one needs a filter of millions
)
SMALLEST, DECADES = 1e-10, 8.0  # of power, and below the loudest
_UNKNOWN = 2**63 - 1  # the length libsndfile gives a FLAC that was written into a pipe; reading such a one fails
_STREAMED = 0x7FFFF000  # what writers that cannot go back put down as the length of a WAV file, or more


def decode_sound(data: bytes, *, max_samples: float = MAX_SAMPLES) -> tuple[np.ndarray, int]:
    """FLAC, WAV or OGG bytes -> (float32 [samples], mono, full scale being 1; samples a second).

    Raises DataError when the bytes are no such sound, damaged, cut short, silent by being empty, or beyond the limits.
    """
    kind = _kind_of(data)
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate, channels, length = file.samplerate, file.channels, file.frames
            if length == _UNKNOWN:
                raise DataError(f"the {kind} does not say how long it is: encode it into a file, not into a pipe")
            _refuse_beyond_limits(rate, channels, length, max_samples)
            wave = file.read(length, dtype="float32", always_2d=True)
    except DataError:
        raise
    except soundfile.LibsndfileError as error:  # whose own text names an object in memory
        raise DataError(f"damaged {kind}: {error.error_string}") from error
    except Exception as error:  # hostile bytes: RuntimeError, TypeError, MemoryError, ...
        raise DataError(f"damaged {kind}: {first_line(error)}") from error
    if len(wave) < length or _ends_early(data, kind):
        raise DataError(f"damaged {kind}: it ends early, after {len(wave) / rate:.2f} s")
    if not len(wave):
        raise DataError(f"the {kind} holds no sound")
    if not (np.abs(wave) <= LOUDEST).all():  # nor is it so for what is not a number
        raise DataError(f"damaged {kind}: it holds values that are no sound (not finite, or beyond {LOUDEST:.0f})")
    return wave.mean(axis=1, dtype=np.float32), rate


@dataclass(frozen=True)
class AudioTransform:
    """FLAC, WAV or OGG bytes -> float32 [frames, mels] log-mel frames. Defaults are Whisper's: 30 s at 16 kHz.

    Of a longer sound evaluation (no generator) keeps the beginning and training a stretch at random; a shorter one is
    followed by silence. rate: samples a second; window and hop: seconds.
    Raises ValueError when a setting makes no sense.
    """

    frames: int = 3000
    rate: int = 16_000
    window: float = 0.025
    hop: float = 0.010
    mels: int = 80

    def __post_init__(self) -> None:
        if self.frames < 1 or self.mels < 1:
            raise ValueError(f"frames is {self.frames} and mels {self.mels}: give 1 or more of each")
        low, high = RATES
        if not low <= self.rate <= high:
            raise ValueError(f"rate is {self.rate}: give {low} to {high} samples a second")
        if not 0 < self._hop <= self._window:
            raise ValueError(
                f"window is {self.window} s and hop {self.hop} s: give 0 < hop <= window, and at least a sample"
            )
        if not mel_filters(self.rate, self._window, self.mels).any(axis=1).all():
            raise ValueError(f"mels is {self.mels}: more than a window of {self.window} s tells apart; give fewer")

    def __call__(self, data: bytes, generator: np.random.Generator | None) -> tuple[np.ndarray, int]:
        """(float32 [frames, mels], how many of the frames hold sound: 1 or more); generator None = evaluation.

        Raises DataError as `decode_sound` does.
        """
        wave, rate = decode_sound(data)
        wanted = self.frames * self._hop  # samples, at our rate
        kept = math.ceil(wanted * rate / self.rate)  # samples, at its own
        start = 0 if generator is None or len(wave) <= kept else int(generator.integers(len(wave) - kept + 1))
        wave = _resample(wave[start : start + kept], rate, self.rate)[:wanted]
        valid = -(-len(wave) // self._hop)
        return self._log_mel(np.pad(wave, (0, wanted - len(wave)))), valid

    def _log_mel(self, wave: np.ndarray) -> np.ndarray:
        """float32 [frames * hop] -> float32 [frames, mels]."""
        padded = np.pad(wave, self._window // 2, mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(padded, self._window)[:: self._hop][: self.frames]
        spectrum = rfft(windows * self._hann, axis=1)
        power = spectrum.real**2 + spectrum.imag**2
        mel = self._filters @ np.ascontiguousarray(power.T)
        log = np.log10(np.maximum(mel, SMALLEST))
        log = np.maximum(log, log.max() - DECADES)
        return np.ascontiguousarray(((log + 4) / 4).T, np.float32)

    @property
    def _window(self) -> int:
        return round(self.window * self.rate)

    @property
    def _hop(self) -> int:
        return round(self.hop * self.rate)

    @cached_property
    def _hann(self) -> np.ndarray:
        return hann(self._window, sym=False).astype(np.float32)

    @cached_property
    def _filters(self) -> csr_array:
        """Sparse, as a frequency lies in two triangles at most; and so a sum in one order, in one thread."""
        return csr_array(mel_filters(self.rate, self._window, self.mels))


def mel_filters(rate: int, window: int, mels: int) -> np.ndarray:
    """float32 [mels, window // 2 + 1]: the weight of each frequency of the spectrum in each mel; see the module."""
    corners = _hertz(np.linspace(0, _mel(rate / 2), mels + 2))
    frequencies = np.arange(window // 2 + 1) * rate / window
    low, centre, high = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising, falling = (frequencies - low) / (centre - low), (high - frequencies) / (high - centre)
    return (np.maximum(0, np.minimum(rising, falling)) * 2 / (high - low)).astype(np.float32)


def _mel(hertz: float) -> float:
    return 3 * hertz / 200 if hertz < 1000 else 15 + 27 * math.log(hertz / 1000) / math.log(6.4)


def _hertz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, 200 * mel / 3, 1000 * np.exp(math.log(6.4) * (mel - 15) / 27))


def _resample(wave: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """float32 at `rate` -> float32 at `wanted`, by a polyphase low-pass filter."""
    ratio = Fraction(wanted, rate).limit_denominator(FINEST)
    return wave if ratio == 1 else resample_poly(wave, ratio.numerator, ratio.denominator)


def _kind_of(data: bytes) -> str:
    if data[:4] == b"fLaC":
        return "FLAC"
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        return "WAV"
    if data[:4] == b"OggS":
        return "OGG"
    raise DataError(f"not a FLAC, WAV or OGG sound ({len(data)} bytes that start with {first_bytes(data)})")


def _refuse_beyond_limits(rate: int, channels: int, length: int, max_samples: float) -> None:
    low, high = RATES
    if not low <= rate <= high:
        raise DataError(f"a sound of {rate} samples a second: from {low} to {high} can be used")
    if channels > MAX_CHANNELS:
        raise DataError(f"a sound of {channels} channels, over the limit of {MAX_CHANNELS}")
    if length * channels > max_samples:
        raise DataError(
            f"a sound of {length} samples in {channels} channels, over the limit of {max_samples:.0f} in all: "
            "refused before decoding"
        )


def _ends_early(data: bytes, kind: str) -> bool:
    """Whether a WAV or OGG file is shorter than it says, which libsndfile does not mind."""
    if kind == "WAV":
        length = int.from_bytes(data[4:8], "little")  # of what follows
        return len(data) < 8 + length < _STREAMED
    if kind == "OGG":  # RFC 3533: a page is 27 bytes, a table of lengths whose size is the last of them, and the parts
        page = data[data.rfind(b"OggS") :]
        lengths = page[27 : 27 + page[26]] if len(page) > 26 else b""
        return len(page) < 27 or len(lengths) < page[26] or len(page) < 27 + len(lengths) + sum(lengths)
    return False
