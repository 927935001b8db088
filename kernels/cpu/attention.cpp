/* The operator from C: all heads of all rows, which several threads share. Each head's numbers are made by one thread
 * alone, so they do not depend on how many there are. */
#include <cstdlib>
#include <cstring>

#include "drl_policy.h"
#include "operator.h"

using drl::attention::Kernels;

namespace {

const Kernels &kernels(const drl_attention &call) {
#if defined(__x86_64__)
    const char *names = call.instruction_set ? call.instruction_set : drl_instruction_sets();
    if (std::strstr(names, "avx512")) return drl::attention::AVX512;
    if (std::strstr(names, "avx2")) return drl::attention::AVX2;
#else
    (void)call;
#endif
    return drl::attention::BASELINE;
}

struct Scratch {
    float *memory = nullptr;
    int64_t size = 0;
    ~Scratch() { std::free(memory); }
    float *of(int64_t wanted) {
        if (wanted > size) {
            std::free(memory);
            memory = static_cast<float *>(std::aligned_alloc(64, (wanted * sizeof(float) + 63) / 64 * 64));
            size = memory ? wanted : 0;
        }
        return memory;
    }
};

thread_local Scratch scratch;

/* Returns 0, or 1 if there was no memory. */
int each_head(const drl_attention &call, void (*kernel)(const drl_attention &, int64_t, int64_t, float *), int threads) {
    const int64_t heads = call.batch * call.heads, size = kernels(call).scratch(call);
    int failed = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(| : failed) if (threads > 1)
    for (int64_t i = 0; i < heads; ++i) {
        float *memory = scratch.of(size);
        if (memory) kernel(call, i / call.heads, i % call.heads, memory);
        else failed = 1;
    }
    return failed;
}

} // namespace

extern "C" {

DRL_API int drl_attention_forward(const drl_attention *call, int threads) {
    return each_head(*call, kernels(*call).forward, threads);
}

DRL_API int drl_attention_backward(const drl_attention *call, int threads) {
    return each_head(*call, kernels(*call).backward, threads);
}
}
