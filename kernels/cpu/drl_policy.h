/* A trained policy as one function: an observation and a reward in, an action out, at the same cost at every step.
 *
 *     drl_policy *policy = drl_policy_open("policy/model.safetensors", DRL_FLOAT32, error, sizeof error);
 *     float *state = malloc(drl_policy_state_size(policy) * sizeof(float));
 *     drl_policy_start(policy, state, 3600.0f);
 *     drl_policy_step(policy, 1, NULL, observation, reward, NULL, state, state, action, 1);
 *
 * A policy is read only and may be used by several threads at once. A state belongs to one environment, is plain
 * memory of constant size, and may be copied, kept and sent; two threads must not write one state at the same time.
 * The numbers of an environment do not depend, to the last bit, on the others in the call nor on `threads`; they
 * depend on the instruction set. The first call of a thread takes its working memory, the first that is shared starts the
 * threads that share it; no other call allocates. */
#ifndef DRL_POLICY_H
#define DRL_POLICY_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define DRL_API __declspec(dllexport)
#else
#define DRL_API __attribute__((visibility("default")))
#endif

#define DRL_ABI 3

typedef struct drl_policy drl_policy;

/* What the weights are kept in. With DRL_BFLOAT16 the products are those of bfloat16 numbers, summed in float32; states
 * and everything else stay float32. */
enum { DRL_FLOAT32 = 0, DRL_BFLOAT16 = 1 };

/* phi of the linear attention: elu(x) + 1, max(x, 0), x. */
enum { DRL_ELU1 = 0, DRL_RELU = 1, DRL_IDENTITY = 2 };

typedef struct {
    int32_t observation_dim, action_dim, width, layers, heads, max_timesteps, feature_map;
    float return_scale; /* returns-to-go are divided by it */
} drl_sizes;

/* A named array of float32 numbers, as in the exported model.safetensors. Some may be absent:
 * without model.blocks.<i>.attention.decay, (heads,), a layer's memory does not fade; without model.return_cap,
 * (max_timesteps,), returns-to-go are read as they are, else as no more than this; without model.embed_action earlier
 * actions are not read, and the previous action in a state is only kept. */
typedef struct {
    const char *name;
    const float *data;
    int64_t count;
} drl_tensor;

/* DRL_ABI of the library, to be compared with that of the header. */
DRL_API int drl_abi(void);

/* The instruction sets that this machine has, best first, separated by spaces. */
DRL_API const char *drl_instruction_sets(void);

/* Copy and pack the weights. instruction_set: one of drl_instruction_sets(), or NULL for the first. Returns NULL if
 * something is missing, does not fit or is not finite, with one line in `error`. */
DRL_API drl_policy *drl_policy_new(const drl_sizes *sizes, const drl_tensor *tensors, int64_t count, int precision,
                           const char *instruction_set, char *error, size_t error_size);

/* The same from the model.safetensors of an exported policy (drl export RUN policy/). */
DRL_API drl_policy *drl_policy_open(const char *file, int precision, char *error, size_t error_size);

DRL_API void drl_policy_free(drl_policy *policy);

DRL_API drl_sizes drl_policy_sizes(const drl_policy *policy);

/* The return that the exported policy asks for, in the environment's units; NaN if it names none. */
DRL_API float drl_policy_target_return(const drl_policy *policy);

DRL_API const char *drl_policy_instruction_set(const drl_policy *policy);

/* float32 numbers in the state of one environment:
 *     [0] target_return   [1] return_to_go   [2] timestep, the bits of an int32   [3 ...] previous action in [-1, 1]
 *     then from drl_policy_state_head on, for each layer, kv (heads, features, values) and z (heads, features), values
 *     and features of a head padded with zeros to drl_policy_state_padded. */
DRL_API int64_t drl_policy_state_size(const drl_policy *policy);
DRL_API int64_t drl_policy_state_head(const drl_policy *policy);
DRL_API int64_t drl_policy_state_padded(const drl_policy *policy);

/* An episode that has not begun. target_return: the return to ask for, in the environment's units. */
DRL_API void drl_policy_start(const drl_policy *policy, float *state, float target_return);

/* One step of n environments.
 *     rows         n indices of distinct states, or NULL for 0 ... n-1
 *     observation  raw, (n, observation_dim)
 *     reward       what the previous action earned, in the environment's units, (n,); not read where an episode begins
 *     begins       1 where an episode begins, (n,); NULL: only where no step was made yet
 *     before       states before the step; state i is at before + i * drl_policy_state_size
 *     after        states after the step; may be `before`
 *     action       written: in the environment's box, (n, action_dim)
 *     threads      how many share the work, if there is enough of it
 * Returns 0; or, with nothing written, 1 + i if observation i is not finite, or -(1 + i) if reward i is not; or, with
 * all states and actions written, 1 + n + i if action i is not finite, which is no action to be taken: a number has
 * overflowed, and states that were overwritten are of no use any more. */
DRL_API int64_t drl_policy_step(const drl_policy *policy, int64_t n, const int64_t *rows, const float *observation,
                        const float *reward, const uint8_t *begins, const float *before, float *after, float *action,
                        int threads);

#ifdef __cplusplus
}
#endif

#endif
