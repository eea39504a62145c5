"""Building the CPU kernels: vectors per ISA, sources, Inductor's compiler."""
