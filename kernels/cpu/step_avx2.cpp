/* AVX2 and FMA: 16 registers of 8 floats. */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define NAME AVX2
#define TITLE "avx2"
#define LANES 8
#define ROWS 3
#define PAIRS 0
#include "step.h"
#include "attention.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
