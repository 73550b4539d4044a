"""Fused operations, each a file: a plain-torch twin that says what is computed, and a Triton kernel that does it fast.

The public function of a file dispatches on the device of its input. The twin (`*_torch`) is the kernel's oracle in
tests and the implementation on CPU, but for the twins of kernels that an engine on a CPU never needs: `matmul`,
`norm_linear` (torch has the products), `all_reduce_rms_norm` (gloo has the sums), `paged_attention_decode` and
`paged_attention_prefill` (attention/sdpa.py attends). Layers call the public functions and know nothing of Triton.
"""
