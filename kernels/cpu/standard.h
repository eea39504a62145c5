// What the CPU kernels, and Inductor's way of calling them from Python, include. Precompiled once per compiler and
// flags (build.py): reading it takes longer than compiling most kernels.
#pragma once
#include <Python.h>
#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <sstream>
#include <type_traits>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif
