"""The options of `drl suite`."""


def add(Parser: type):
    """Its parser; `Parser`: the class of it."""
    verb = Parser(description="Train and score every seed of every variant on every task that a YAML file names. Made "
                  "to run unattended: what is done is not done again, what was stopped or killed goes on, what fails "
                  "is told and counted, and the rest goes on.")
    verb.add_argument("suite", type=str, help="YAML file, e.g. configs/suites/gym9.yaml")
    verb.add_argument("--out", type=str, default="", help="folder of the runs, <out>/<variant>/<env>/<tier>/seed-<n> "
                      "(default: runs/<name of the file>)")
    verb.add_argument("--devices", type=str, nargs="+", default=["auto"], help="what trains: cpu, or GPUs such as "
                      "cuda:0 cuda:1, each with a process of its own; a GPU that is named twice compiles and saves one "
                      "job while it trains another, and trains both at once where nvidia-cuda-mps-control -d runs; "
                      "auto: all GPUs, else the CPU. Scores are made on the CPU, those by window on a GPU where there "
                      "is one")
    verb.add_argument("--only", type=str, nargs="+", default=[], help="variants, by name (default: all)")
    verb.add_argument("--tasks", type=str, nargs="+", default=[], help="tasks, e.g. hopper/medium (default: all)")
    verb.add_argument("--seeds", type=int, nargs="+", default=[], help="of those in the file (default: all)")
    verb.add_argument("--part", type=str, default="1/1", help="I/N: every Nth job, a variant on a task, from the Ith; "
                      "for N machines that share the folder")
    verb.add_argument("--packed", type=str, nargs="+", default=[], help="files that drl report --pack wrote, as of "
                      "another machine: runs whose last scores they hold are not made again; drl report makes one "
                      "page of them and of the rest")
    verb.add_argument("--collect", action="store_true", help="collect the datasets that are missing first")
    verb.add_argument("--dry-run", action="store_true", help="tell how far each job is, and how long what is left "
                      "will take; writes nothing")
    return verb
