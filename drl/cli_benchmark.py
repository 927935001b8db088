"""`drl benchmark`: what its verbs measure. Imports stand inside, so that `drl --help` answers at once."""


def run(options) -> None:
    """Measure what `options` of the command line name, and print it."""
    VERBS[options.verb](options[options.verb])


def step(options) -> None:
    from drl.benchmark import act
    from drl.benchmark_step import step as measured
    from drl.captured import is_cuda
    from drl.resolve import resolve_device

    fields = options.as_dict()
    if is_cuda(resolve_device(fields.pop("device"))):
        print(act(batch_sizes=options.batch_sizes or (1, 64, 1024, 4096), steps=options.steps))
    else:
        print(measured(among=fields.pop("peers"), json_file=fields.pop("json"), **fields))


def update(options) -> None:
    from drl.benchmark import update as measured

    print(measured(updates=options.updates, threads=options.threads, batch_sizes=options.batch_sizes,
                   seeds=options.seeds, precision=options.precision, compile=options.compile))


def evaluate(options) -> None:
    from drl.benchmark_evaluate import evaluate as measured

    print(measured(**options.as_dict()))


def attention(options) -> None:
    from drl.benchmark_attention import attention as measured

    fields = options.as_dict()
    print(measured(among=fields.pop("peers"), json_file=fields.pop("json"), **fields))


VERBS = {"step": step, "update": update, "evaluate": evaluate, "attention": attention}
