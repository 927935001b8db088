"""The options of `drl benchmark`."""

from typing import Literal

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
FeatureMap = Literal["elu1", "identity"]


def add(benchmarks, Parser: type) -> None:
    """Add the verbs of `drl benchmark`; `Parser`: the class of their parsers."""
    verb = Parser(description="Microseconds per action, from a numpy observation to a numpy action: on the CPU of one "
                  "environment, beside others' runtimes of the same step and softmax's ways of remembering, their "
                  "actions checked against float64 first; on a GPU of many environments, by CUDA graph.")
    verb.add_argument("--steps", type=int, default=10_000, help="timed environment steps of each row; 3000 at most of "
                      "softmax, which is slow")
    verb.add_argument("--threads", type=int, default=1, help="of torch and every other runtime")
    verb.add_argument("--device", type=str, default="cpu", help="cpu or cuda")
    verb.add_argument("--peers", type=str, default="", help="rows of the CPU's table, separated by commas, e.g. "
                      "cpu,torch,window; compile, aotinductor and onnx take a minute to build (default: all that are "
                      "here)")
    verb.add_argument("--batch_sizes", type=int, nargs="+", default=[], help="environments side by side: on the CPU a "
                      "second table, beside the time of the matrix products alone; on a GPU (default: 1 64 1024 4096)")
    verb.add_argument("--long", action="store_true", help="step ours 100,000 times as well: time and memory, early and "
                      "late")
    verb.add_argument("--figure", type=str | None, default=None, help="draw microseconds against the step of the "
                      "episode into this PNG file; needs the extra drl[report]")
    verb.add_argument("--json", type=str | None, default=None, help="file for all that was measured")
    benchmarks.add_subcommand("step", verb, help="microseconds per action")
    verb = Parser(description="Milliseconds per gradient update (the default model, chunks of 20 steps), with the "
                  "default's critic and without, on the GPU where there is one.")
    verb.add_argument("--updates", type=int, default=50, help="timed updates of each row")
    verb.add_argument("--threads", type=int, default=0, help="torch threads (0: all cores)")
    verb.add_argument("--batch_sizes", type=int, nargs="+", default=[64], help="chunks per update")
    verb.add_argument("--seeds", type=int, nargs="+", default=[1], help="how many seeds train side by side")
    verb.add_argument("--precision", type=Literal["auto", "float32", "bfloat16"], default="auto", help="of products; "
                      "auto: bfloat16 on a GPU")
    verb.add_argument("--compile", type=Literal["auto", "on", "off"], default="auto", help="torch.compile; auto: on a "
                      "GPU, for long runs")
    benchmarks.add_subcommand("update", verb, help="milliseconds per update")
    verb = Parser(description="Environment steps per second of whole evaluations on all cores, beside the physics "
                  "alone on the same cores and the usual loop of one environment and a recomputed softmax window.")
    verb.add_argument("--environment", type=str, default="Hopper-v5", help="Gymnasium id")
    verb.add_argument("--run", type=str, default="", help="folder of a run, a checkpoint or an exported policy "
                      "(default: random weights, whose episodes are short)")
    verb.add_argument("--episodes", type=int, default=100, help="episodes of each repeat")
    verb.add_argument("--environments", type=int, default=100, help="environments side by side")
    verb.add_argument("--engine", type=str, default="auto", help="of the policy: cpu, cpu-bfloat16 or torch; "
                      "auto: cpu where it was built")
    verb.add_argument("--window_steps", type=int, default=300, help="environment steps of the window in each repeat")
    verb.add_argument("--repeats", type=int, default=7, help="turns that each takes")
    benchmarks.add_subcommand("evaluate", verb, help="environment steps per second")
    verb = Parser(description="Causal linear attention, our backends beside other implementations that are installed: "
                  "numbers checked against float64 first, then microseconds per call eager and in a CUDA graph, "
                  "kernels per call, peak memory (MB, 10^6 bytes), percent of the time that the bytes alone take. On "
                  "CUDA where there is one. The first calls of compiled and tuned peers take minutes: choose few "
                  "--peers, and --shapes of one D.")
    verb.add_argument("--shapes", type=str, default="", help="BxTxHxD separated by spaces: sequences, tokens, heads, "
                      "features per head (default: of windows and whole episodes)")
    verb.add_argument("--peers", type=str, default="", help="who, separated by commas: ours, fla, fast-transformers, "
                      "softmax, or single rows such as chunked,fla-chunk (default: all that are here)")
    verb.add_argument("--dtype", type=Dtype, default="auto", help="of q, k and v; auto: bfloat16 on CUDA, float32 on "
                      "the CPU and for --step")
    verb.add_argument("--step", action="store_true", help="measure steps of 3 tokens that continue a float32 state, "
                      "instead of whole sequences")
    verb.add_argument("--feature_map", type=FeatureMap, default="elu1", help="elu1: everyone maps q and k inside the "
                      "time; identity: they come in mapped, so that the operator alone is measured")
    verb.add_argument("--separate", action="store_true", help="q, k and v on their own instead of views of one "
                      "projection's output")
    verb.add_argument("--seconds", type=float, default=0.3, help="of timed calls, for each of the times of a row")
    verb.add_argument("--limit", type=float, default=0, help="seconds after which no new row begins (0: none)")
    verb.add_argument("--fast_transformers", type=str, default="", help="causal_product_cuda.cu from the source of "
                      "pytorch-fast-transformers, to build and measure it; needs nvcc")
    verb.add_argument("--json", type=str | None, default=None, help="file for all that was measured, written after "
                      "each row")
    benchmarks.add_subcommand("attention", verb, help="microseconds of linear attention")
