"""The floor plan, enforced: who may import whom, through which file a library enters, how large a room may grow."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"drl": ROOT / "drl", "drl.kernels": ROOT / "kernels"}  # package_dir in setup.cfg
MODULES = {
    ".".join([package, *path.relative_to(folder).with_suffix("").parts]).removesuffix(".__init__"): path
    for package, folder in PACKAGES.items()
    for path in sorted(folder.rglob("*.py"))
}
FLOORS = [  # each module may import only from floors below its own
    {"drl.errors", "drl.progress", "drl.versions", "drl.scores", "drl.captured", "drl.signals"},
    {"drl.disk", "drl.foreign", "drl.faults"},
    {"drl.intact", "drl.lock", "drl.figures", "drl.names", "drl.parallel", "drl.benchmark_device", "drl.appended",
     "drl.bounds", "drl.trees"},
    {"drl.config", "drl.benchmark_figure", "drl.tracker"},
    {"drl.config_files"},
    {"drl.report_pack"},
    {"drl.report_rows"},
    {"drl.report_table", "drl.report_commands"},
    {"drl.report_page", "drl.report_figures"},
    {"drl.report_curves"},
    {"drl.kernels.feature_map", "drl.kernels.decay", "drl.kernels.reference", "drl.kernels.chunked", "drl.kernels.cpu"},
    {"drl.kernels.cpu.attention"},
    {"drl.kernels.triton.tiles"},
    {
        "drl.kernels.triton.forward", "drl.kernels.triton.backward", "drl.kernels.triton.step",
        "drl.kernels.triton.mlp",
    },
    {"drl.kernels.triton.launch", "drl.kernels.triton.token_wise_launch"},
    {"drl.kernels.triton.ops", "drl.kernels.triton.token_wise_ops"},
    {"drl.kernels.triton"},
    {"drl.kernels.linear_attention", "drl.kernels.token_wise"},
    {"drl.kernels"},
    {"drl.kernels.cpu.__main__"},
    {"drl.attention", "drl.cloning", "drl.benchmark_peers", "drl.benchmark_table"},
    {"drl.benchmark_inputs"},
    {"drl.benchmark_attention"},
    {"drl.model"},
    {"drl.data.store", "drl.data.guard", "drl.data.d4rl_hdf5"},
    {"drl.data.columns", "drl.foreign_tensors"},
    {"drl.data.sampling", "drl.data.packed", "drl.data.minari_metadata", "drl.data.minari_hdf5"},
    {"drl.data.minari_remote"},
    {"drl.data.minari_files"},
    {"drl.data.minari_writer"},
    {"drl.data.d4rl"},
    {"drl.data", "drl.envs_mujoco"},
    {"drl.envs"},
    {"drl.envs_process", "drl.watched"},
    {"drl.behaviour.actor", "drl.behaviour.rounding"},
    {"drl.behaviour.play"},
    {"drl.behaviour.pieces", "drl.behaviour.plan"},
    {"drl.behaviour"},
    {"drl.checkpoint_files", "drl.collect", "drl.descent"},
    {"drl.checkpoint"},
    {"drl.policy_state", "drl.benchmark_model"},
    {"drl.engine"},
    {"drl.acting", "drl.exported"},
    {"drl.policy_doors"},
    {"drl.policy"},
    {"drl.players"},
    {"drl.rollout", "drl.guidance"},
    {"drl.losses"},
    {"drl.gradient_step"},
    {"drl.evaluate", "drl.trainer", "drl.portable", "drl.benchmark_batches", "drl.benchmark_step_memories"},
    {"drl.resolve", "drl.train", "drl.export", "drl.benchmark_step_peers", "drl.benchmark_corl"},
    {"drl.card", "drl.report_runs"},
    {"drl.report", "drl.benchmark", "drl.benchmark_step", "drl.benchmark_evaluate"},
    {"drl.suite_plan", "drl.suite_times"},
    {"drl.suite_file", "drl.suite_work"},
    {"drl.suite_worker", "drl.suite_estimate"},
    {"drl.suite_screen"},
    {"drl.suite"},
    {"drl.cli_benchmark", "drl.cli_suite", "drl.options_benchmark",
     "drl.options_report", "drl.options_suite"},
    {"drl.options"},
    {"drl.cli"},
    {"drl.__main__"},
    {"drl"},
]
FLOOR = {module: height for height, floor in enumerate(FLOORS) for module in floor}
KERNELS = {module for module in MODULES if module == "drl.kernels" or module.startswith("drl.kernels.")}
BACKENDS = KERNELS - {
    "drl.kernels", "drl.kernels.linear_attention", "drl.kernels.token_wise", "drl.kernels.feature_map",
    "drl.kernels.decay",
}
TRITON = {module for module in KERNELS if module.startswith("drl.kernels.triton.")}  # not the door, which is light
DOORS = {  # the only modules through which a library comes in
    "fast_transformers": {"drl.benchmark_step_peers"},
    "fla": {"drl.benchmark_peers"},
    "gymnasium": {"drl.envs", "drl.envs_mujoco", "drl.envs_process", "drl.data.minari_writer"},
    "h5py": {"drl.data.d4rl_hdf5", "drl.data.minari_hdf5", "drl.data.minari_writer"},
    "jsonargparse": {"drl.options"},
    "matplotlib": {"drl.figures"},
    "minari": {"drl.data.minari_files", "drl.data.minari_remote", "drl.data.minari_writer"},
    "mujoco": {"drl.envs", "drl.envs_mujoco"},
    "onnx": {"drl.portable"},
    "onnxscript": {"drl.portable"},
    "onnxruntime": {"drl.benchmark_step_peers"},
    "tensorboard": {"drl.tracker"},
    "threadpoolctl": {"drl.behaviour.rounding"},
    "torch.utils.tensorboard": set(),
    "tqdm": {"drl.progress"},
}
LINES = 260


@functools.cache
def parse(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


@functools.cache
def imports(tree: ast.AST) -> set[tuple[str, str]]:
    """Every import anywhere in `tree`, functions included: ("a.b", "") for `import a.b`, ("a", "b") for `from a
    import b`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: a relative import hides what is imported; name it in full"
            found |= {(node.module, alias.name) for alias in node.names}
    return found


def rooms_imported(module: str) -> set[str]:
    """The modules of ours that `module` imports: `from drl.kernels import chunked` means drl.kernels.chunked."""
    named = {
        f"{package}.{name}" if f"{package}.{name}" in MODULES else package for package, name in imports(parse(module))
    }
    return {name for name in named if name.partition(".")[0] == "drl"}


def uses(tree: ast.AST, library: str) -> bool:
    return any(f"{package}.{name}.".startswith(library + ".") for package, name in imports(tree))


def imported_on_import(module: str) -> ast.Module:
    """The module without its functions: what an import of it executes."""
    class WithoutFunctions(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return None

        visit_AsyncFunctionDef = visit_FunctionDef

    return WithoutFunctions().visit(parse.__wrapped__(module))  # it changes what it visits


def test_every_module_has_a_floor_of_its_own():
    homeless = MODULES.keys() - FLOOR.keys()
    assert not homeless, f"give {sorted(homeless)} a floor in FLOORS"
    assert sum(map(len, FLOORS)) == len(FLOOR), "a module stands on two floors"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_only_point_down(module):
    rooms = rooms_imported(module)

    unknown = rooms - MODULES.keys()
    above = {other for other in rooms & FLOOR.keys() if FLOOR[other] >= FLOOR[module]}

    assert not unknown, f"{module} imports {sorted(unknown)}, which is no module"
    assert not above, f"{module} imports {sorted(above)}, which is not below it"


@pytest.mark.parametrize("module", sorted(KERNELS))
def test_kernels_know_torch_and_the_standard_library_alone(module):
    libraries = {package.partition(".")[0] for package, _ in imports(parse(module))} - sys.stdlib_module_names
    assert libraries <= {"torch", "drl"} | ({"triton"} if module in TRITON else set())
    assert rooms_imported(module) <= KERNELS


@pytest.mark.parametrize("module", sorted(BACKENDS))
def test_no_backend_imports_another(module):
    def backend(name: str) -> str:
        return name.split(".")[2]

    assert {backend(room) for room in rooms_imported(module) & BACKENDS} <= {backend(module)}


@pytest.mark.parametrize("module", sorted(MODULES.keys() - KERNELS))
def test_kernels_are_entered_by_their_door(module):
    ways_in = {way for way in imports(parse(module)) if ".".join(way).startswith("drl.kernels")}
    assert {package for package, _ in ways_in} <= {"drl.kernels"} and ("drl.kernels", "") not in ways_in, (
        f"{module} must say: from drl.kernels import ..."
    )
    assert not rooms_imported(module) & BACKENDS, "a backend is chosen by name, not imported"


@pytest.mark.parametrize("library", sorted(DOORS))
def test_a_library_comes_in_by_its_own_door(library):
    users = {module for module in MODULES if uses(parse(module), library)}
    assert users <= DOORS[library], f"{library} also enters through {sorted(users - DOORS[library])}"


@pytest.mark.parametrize("module", sorted(module for module in MODULES if module.startswith("drl.data.")))
def test_of_gymnasium_the_datasets_know_the_spaces_alone(module):
    packages = {package for package, _ in imports(parse(module)) if package.partition(".")[0] == "gymnasium"}
    assert packages <= {"gymnasium.spaces"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_matplotlib_is_imported_when_a_figure_is_asked_for(module):
    assert not uses(imported_on_import(module), "matplotlib")


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_can_be_read_in_one_sitting(module):
    lines = len(MODULES[module].read_text().splitlines())
    assert lines <= LINES, f"{module} has {lines} lines; split it by meaning, not by length"


@pytest.mark.parametrize(
    "statement",
    ["import drl", "from drl.cli import main; main(['--help'])", "from drl.cli import main; main(['train', '--help'])"],
    ids=["import", "help", "help of train"],
)
def test_neither_import_nor_help_waits_for_heavy_libraries(statement):
    code = f"""
import sys
try:
    {statement}
except SystemExit as end:
    assert not end.code, end.code
sys.exit(str(sorted({{"torch", "mujoco", "gymnasium", "minari", "matplotlib"}} & sys.modules.keys())))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stderr.strip() == "[]"
