/* AVX-512: 32 registers of 16 floats. */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#endif
#define NAME AVX512
#define TITLE "avx512"
#define LANES 16
#define ROWS 6
#define PAIRS 0
#include "step.h"
#include "attention.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
