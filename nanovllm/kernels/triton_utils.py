"""What every Triton kernel file imports: `triton` and `tl` where they are installed, and the options of a launch."""

import functools
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
else:
    try:
        import triton
        import triton.language as tl
    except ImportError:  # macOS, CPU-only installs: the kernels below then stay plain functions that nobody calls
        triton = tl = None
    try:
        from triton.tools.tensor_descriptor import TensorDescriptor
    except ImportError:  # before Triton 3.4
        TensorDescriptor = None

HAS_TRITON = triton is not None
if not HAS_TRITON:
    tl = SimpleNamespace(constexpr=object)
# Before Triton 3.5 there is no tl.extra.cuda.gdc_wait, or one that cannot be called.
HAS_GDC = HAS_TRITON and tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 5)


# Programmatic dependent launch (Hopper and later): a kernel may start while its predecessor drains, and waits for the
# predecessor's writes in `pdl_wait`. Every kernel calls that before it touches memory which another kernel writes.
def has_pdl() -> bool:
    """Of the current GPU."""
    return HAS_TRITON and torch.cuda.is_initialized() and _has_pdl(torch.cuda.current_device())


@functools.cache
def _has_pdl(index: int) -> bool:
    return HAS_GDC and torch.version.hip is None and torch.cuda.get_device_capability(index) >= (9, 0)


def has_tma() -> bool:
    """Whether tiles can travel by the tensor memory accelerator (Hopper and later)."""
    return TensorDescriptor is not None and has_pdl()


def jit(function=None, *, do_not_specialize: tuple[str, ...] = ()):
    """`triton.jit`, or nothing where Triton is missing.

    A kernel is compiled anew, for seconds, when an integer argument turns 1 or a multiple of 16, or a pointer's
    alignment to 16 bytes changes: `do_not_specialize` names those that differ from step to step and gain nothing by it.
    """
    if function is None:
        return functools.partial(jit, do_not_specialize=do_not_specialize)
    return triton.jit(function, do_not_specialize=list(do_not_specialize)) if HAS_TRITON else function


def use_triton(x: torch.Tensor) -> bool:
    return x.is_cuda and can_triton(x.device)


@functools.cache
def can_triton(device: torch.device) -> bool:
    """Triton's kernels are for compute capability 8.0 and later."""
    return HAS_TRITON and torch.cuda.get_device_capability(device) >= (8, 0)


def launch_options(fp_fusion: bool = True) -> dict[str, Any]:
    """The keyword arguments of a launch that say whether it is a programmatic dependent one, and whether the compiler
    may contract products and sums: said each time, since Triton 3.9 warns that its default will change."""
    pdl = {"PDL": True, "launch_pdl": True} if has_pdl() else {"PDL": False}
    return {"enable_fp_fusion": fp_fusion, **pdl}


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """132 of an H100 stand in where there are none, so that interpreted kernels take the same paths."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@functools.cache
def shared_memory_bytes(device: torch.device) -> int:
    """That one program can have, as Triton checks it; an H100's where there is no GPU."""
    if device.type != "cuda":
        return 227 * 1024
    index = torch.cuda.current_device() if device.index is None else device.index
    return triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


if HAS_GDC:

    @jit
    def pdl_wait(PDL: tl.constexpr):
        """Wait for the predecessor's writes; let the successor be launched, which waits here in its turn."""
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()

else:  # Triton looks names up before it knows that a branch is not taken

    @jit
    def pdl_wait(PDL: tl.constexpr):
        pass


@jit
def prefetch_l2(pointers):
    """Have the lines at `pointers` (valid ones, a tensor) travel to L2."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )
