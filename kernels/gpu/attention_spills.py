"""Where the attention kernels spill registers, and why that is accepted; the golden numbers say how much.

By reason and case, the targets: by every version of Triton with golden numbers, or by one. Triton 3.7 makes ptxas
allocate registers for sm_100 in another way (--regAllocOptLevel=2), which spills more.
"""

_ACCEPTED = {
    "ptxas gives up a few words for one more program on a multiprocessor": {
        "forward 64 causal dropout 64x32 w4 s2": "sm_80 3.6.0",
        "forward 80 full 64x64 w4 s3": "sm_100 3.6.0",
        "dkdv 64 window 64x32 w4 s2": "sm_80",
        "dq 64 documents 128x64 w8 s2": "sm_100 3.6.0",
        "dq 64 window documents 128x64 w8 s2": "sm_100 3.7.1",
        "dq 128 lengths 128x64 w8 s2": "sm_100 3.7.1",
        "dq 96 window documents 64x64 w8 s2": "sm_100 3.7.1",
        "dq 96 two-sided documents 64x64 w8 s2": "sm_100",
        "forward 64 all documents fp32 64x32 w8 s2": "sm_80, sm_90",
        "forward 128 window documents tf32 16x16 w8 s1": "sm_80, sm_90, sm_100 3.6.0",
        "forward 128 all documents tf32 16x16 w8 s1": "sm_100 3.7.1",
        "dkdv 64 window documents fp32 32x16 w8 s2": "sm_80 3.6.0",
        "dkdv 64 all documents fp32 32x16 w8 s2": "sm_80",
        "dkdv 64 window documents tf32 32x16 w8 s2": "sm_80 3.6.0",
        "dkdv 128 causal fp32 16x16 w8 s1": "sm_80, sm_90, sm_100 3.6.0",
        "dkdv 128 window documents fp32 16x16 w8 s1": "sm_80",
        "dkdv 64 causal fp32 32x32 w8 s2": "sm_90 3.7.1, sm_100 3.6.0",
        "dkdv 64 all documents fp32 32x32 w8 s2": "sm_90 3.6.0",
        "dkdv 64 window documents tf32 32x32 w8 s2": "sm_90, sm_100",
        "dq 128 all documents tf32 16x16 w8 s1": "sm_90",
        "dq 64 all documents fp32 64x32 w8 s2": "sm_100 3.7.1",
    },
    "6 words at most, and a smaller tile has its price too": {
        "forward 96 window documents 128x32 w4 s2": "sm_80",
        "forward 96 two-sided documents 128x32 w4 s2": "sm_80",
        "dkdv 64 causal 64x32 w4 s2": "sm_80 3.6.0",
        "dkdv 64 window 128x32 w8 s2": "sm_80 3.6.0",
        "dkdv 64 capped window 64x32 w8 s2": "sm_80 3.6.0",
        "dkdv 64 causal dropout 64x32 w8 s2": "sm_80 3.6.0",
        "dkdv 72 causal 64x32 w8 s2": "sm_80 3.6.0",
        "dkdv 80 causal 64x32 w8 s2": "sm_80 3.6.0",
        "dkdv 96 documents 64x32 w8 s2": "sm_80 3.6.0, sm_100 3.7.1",
        "dkdv 96 window 64x32 w8 s2": "sm_80 3.6.0",
        "dkdv 64 two-sided documents 128x32 w8 s2": "sm_80 3.6.0",
        "dkdv 64 causal documents 128x64 w8 s2": "sm_90 3.6.0",
        "dkdv 72 causal 64x64 w8 s2": "sm_90 3.6.0",
        "dkdv 96 causal 64x64 w8 s2": "sm_90 3.6.0",
        "dkdv 128 window documents 128x32 w8 s2": "sm_90 3.6.0",
        "dkdv 64 window lengths 128x64 w8 s2": "sm_90 3.6.0",
        "dkdv 64 window lengths 64x64 w8 s2": "sm_100 3.6.0",
        "dq 96 window documents 64x32 w4 s2": "sm_80 3.6.0",
        "dq 96 two-sided documents 64x32 w4 s2": "sm_80",
        "dq 256 window 64x32 w8 s2": "sm_90 3.7.1",
        "dq 128 causal fp32 16x16 w8 s1": "sm_80",
        "dq 128 window documents fp32 16x16 w8 s1": "sm_90, sm_100 3.6.0",
    },
    "of everything at once; with less of it there are none, or a few words": {
        "dkdv 64 all documents 64x32 w8 s2": "sm_80",
        "dkdv 64 all two-sided 64x32 w8 s2": "sm_80",
        "dkdv 72 all documents 32x16 w8 s2": "sm_80 3.6.0",
        "dkdv 72 all two-sided 32x16 w8 s2": "sm_80 3.6.0",
        "dkdv 72 all documents 32x32 w8 s2": "sm_90, sm_100",
        "dkdv 72 all two-sided 32x32 w8 s2": "sm_90, sm_100",
        "dkdv 256 all documents 32x32 w8 s2": "sm_90 3.6.0",
        "dq 64 all documents 128x64 w8 s2": "sm_100",
        "dq 64 all two-sided 128x64 w8 s2": "sm_100 3.7.1",
        "dq 256 all documents 64x32 w8 s2": "sm_90",
        "dq 256 all two-sided 64x32 w8 s2": "sm_90",
        "dq 128 all documents fp32 16x16 w8 s1": "sm_90 3.6.0, sm_100 3.7.1",
        "dq 64 all documents tf32 64x32 w8 s2": "sm_90",
    },
    "half the keys would read all rows twice": {
        "dkdv 64 documents 128x32 w8 s2": "sm_80 3.6.0",
        "dkdv 64 window documents 128x32 w8 s2": "sm_80 3.6.0",
        "dkdv 64 full 128x64 w8 s2": "sm_100 3.7.1",
        "dkdv 64 causal 128x64 w8 s2": "sm_100",
        "dkdv 128 two-sided documents 128x32 w8 s2": "sm_90",
        "dkdv 64 causal fp16 128x64 w8 s2": "sm_100",
    },
    "half as many rows or keys a turn would slow all that spill none or little; none is timed yet": {
        "dkdv 72 full 64x32 w8 s2": "sm_80 3.6.0",
        "dkdv 72 lengths 64x32 w8 s2": "sm_80 3.6.0",
        "dkdv 72 documents 64x32 w8 s2": "sm_80 3.6.0",
        "dkdv 80 full 64x32 w8 s2": "sm_80 3.6.0",
        "dkdv 80 lengths 64x32 w8 s2": "sm_80 3.6.0",
        "dkdv 80 documents 64x32 w8 s2": "sm_80 3.6.0",
        "dkdv 96 full 64x32 w8 s2": "sm_80 3.6.0",
        "dkdv 96 lengths 64x32 w8 s2": "sm_80 3.6.0",
        "dkdv 96 window documents 64x32 w8 s2": "sm_80 3.6.0",
        "dkdv 96 two-sided documents 64x32 w8 s2": "sm_80 3.6.0",
        "dkdv 96 window documents 64x64 w8 s2": "sm_90",
        "dkdv 96 two-sided documents 64x64 w8 s2": "sm_90",
    },
    "fewer keys would not fill a tensor core": {
        "dkdv 128 documents 64x32 w8 s2": "sm_100 3.7.1",
        "dkdv 128 causal documents 64x32 w8 s2": "sm_100",
        "dkdv 96 window documents 64x32 w8 s2": "sm_100",
        "dkdv 96 two-sided documents 64x32 w8 s2": "sm_100",
        "dkdv 128 window documents 64x32 w8 s2": "sm_100",
        "dkdv 128 two-sided documents 64x32 w8 s2": "sm_100",
        "dkdv 64 window documents 64x64 w8 s2": "sm_100 3.6.0",
    },
}


def _by_case() -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for reason, cases in _ACCEPTED.items():
        for case, targets in cases.items():
            found.setdefault(f"attention_{case}", {}).update(dict.fromkeys(targets.split(", "), reason))
    return found


SPILLS = _by_case()  # for kernels.aot.AotCase.spills
