"""Shared ground rules: a fixed seed, a datasets root of its own, and uninitialised memory that is NaN.

`torch.use_deterministic_algorithms` also fills `torch.empty`, so that memory nobody wrote cannot pass for data; not on
a GPU, where torch has no deterministic form of some operators. Without a GPU, Triton's interpreter runs our kernels.
"""

import os
import signal

import pytest

from drl.behaviour import rounding

os.environ.update(rounding.environment())  # before torch has numpy loaded: what plays in this process is to round so

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are imported

# where a script has put the suite into the background, Ctrl-C is ignored, and would be by what the tests start
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def ground_rules(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(not torch.cuda.is_available())


@pytest.fixture
def torch_threads():
    """Sets the threads of torch; what the machine had comes back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def triton_interpreter():
    """Triton 3.6's interpreter turns a loop's bound, an array of one number, into an int, which numpy 2.4 refuses. And
    it looks through the whole language, to have itself called, at every call of a function of a kernel, which takes
    longer than most of these do: once for each function in each run of a kernel does as well."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        yield
        return
    patch_tensor, patch_language, call = (interpreter._patch_lang_tensor, interpreter._patch_lang,
                                          interpreter.GridExecutor.__call__)
    ready = set()

    def patched_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def patched_language(function):
        if function in ready:
            return interpreter._LangPatchScope()
        ready.add(function)
        return patch_language(function)

    def called(kernel, *arguments, **options):
        ready.clear()  # what the run before had patched is as it was
        return call(kernel, *arguments, **options)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched_tensor)
        monkeypatch.setattr(interpreter, "_patch_lang", patched_language)
        monkeypatch.setattr(interpreter.GridExecutor, "__call__", called)
        yield
