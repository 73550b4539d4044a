"""Fused operations, each a file: a plain-torch twin that says what is computed, and a Triton kernel that does it fast.

The public function of a file dispatches on the device of its input; the twin (`*_torch`) is the kernel's oracle in
tests and the implementation on CPU. Layers call the public functions and know nothing of Triton.
"""
