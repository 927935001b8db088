/* What every machine of the architecture has: SSE2 on x86-64, NEON on 64-bit ARM, whatever else elsewhere. */
#define NAME BASELINE
#define TITLE "baseline"
#define LANES 4
#if defined(__aarch64__)
#define ROWS 6
#else
#define ROWS 3
#endif
#define PAIRS 0
#include "step.h"
#include "attention.h"
