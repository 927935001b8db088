/* Act from C. Each line of the input is the reward of the action before, in the environment's units, and an
 * observation; each line of the output is an action. No Python is involved.
 *
 *     cc act.c $(python -m drl.kernels.cpu) -o act
 *     ./act policy/model.safetensors <observations.txt           policy/ is made by: drl export RUN policy/
 */
#include <drl_policy.h>
#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv) {
    char error[500];
    if (argc != 2) return fprintf(stderr, "usage: act policy/model.safetensors\n"), 2;
    drl_policy *policy = drl_policy_open(argv[1], DRL_FLOAT32, error, sizeof error);
    if (!policy) return fprintf(stderr, "%s\n", error), 1;
    const drl_sizes sizes = drl_policy_sizes(policy);
    float *state = malloc(drl_policy_state_size(policy) * sizeof *state);
    float *observation = malloc(sizes.observation_dim * sizeof *observation), reward;
    float *action = malloc(sizes.action_dim * sizeof *action);
    drl_policy_start(policy, state, drl_policy_target_return(policy));
    while (scanf("%f", &reward) == 1) {
        for (int i = 0; i < sizes.observation_dim; ++i)
            if (scanf("%f", observation + i) != 1) return fprintf(stderr, "an observation is too short\n"), 1;
        const int64_t bad = drl_policy_step(policy, 1, NULL, observation, &reward, NULL, state, state, action, 1);
        const char *what = bad < 0 ? "a reward" : bad > 1 ? "an action" : "an observation";
        if (bad) return fprintf(stderr, "%s is not finite\n", what), 1;
        for (int i = 0; i < sizes.action_dim; ++i)
            printf("%.9g%c", action[i], i + 1 < sizes.action_dim ? ' ' : '\n');
    }
    free(action), free(observation), free(state);
    drl_policy_free(policy);
    return 0;
}
