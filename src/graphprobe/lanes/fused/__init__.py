"""The comparisons of `lanes.measure` as fused Triton kernels. Import late: Triton is not installed everywhere."""
