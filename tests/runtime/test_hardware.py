"""What the machine can do."""

import pytest

from runtime.hardware import cpu_gains_from_bf16

INTEL, AMD = "vendor_id : GenuineIntel", "vendor_id : AuthenticAMD"


@pytest.mark.parametrize(
    ("cpuinfo", "gains"),
    [
        (f"{INTEL}\nflags : avx512f avx512_bf16 amx_bf16 amx_tile", True),
        (f"{INTEL}\nflags : avx512f avx512_bf16", False),
        (f"{AMD}\nflags : avx512f avx512_bf16", True),
        (f"{AMD}\nflags : avx512f avx512_vnni", False),
        ("CPU architecture: 8\nFeatures : fp asimd", False),
    ],
)
def test_bf16_is_taken_on_the_cpus_that_are_faster_with_it(cpuinfo, gains):
    assert cpu_gains_from_bf16(cpuinfo) is gains
