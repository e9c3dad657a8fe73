"""The process that renders chat templates: its limits, and that nothing of it is left over or in the way."""

from __future__ import annotations

import copy
import gc
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from idlm_kernels.model import _render
from idlm_kernels.model.chat_template import ChatTemplate
from idlm_kernels.model.errors import CheckpointError

ECHO = "{{ text }}"
PACKAGE = Path(_render.__file__).parent


def child_of(template: ChatTemplate) -> int:
    assert template._process is not None
    return template._process._child.pid


def is_gone(pid: int, *, orphan: bool = False) -> bool:
    """Whether there is no such process any more, not even as a zombie that nobody has waited for; those of an orphan
    are the system's."""
    for _ in range(500):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if orphan and state == "Z":
            return True
        time.sleep(0.01)
    return False


def grown(by: str) -> str:
    start, end = (
        "{% set n = namespace(x='aa') %}{% for i in range(64) %}{% set n.x = ",
        " %}{% endfor %}{{ n.x|length }}",
    )
    return start + by + end


MEMORY = {
    "format": "{{ '%999999999d' % 1 }}",
    "ljust": "{{ 'a'.ljust(999999999) }}",
    "center": "{{ 'a'|center(999999999) }}",
    "indent": "{{ ('x\n' * 99999)|indent(99999) }}",
    "tojson": "{{ [1]|tojson(indent=999999999) }}",
    "~": grown("n.x ~ n.x"),
    "+": grown("n.x + n.x"),
    "join": grown("[n.x, n.x]|join"),
    "replace": grown("n.x.replace('a', 'aa')"),
}


@pytest.mark.parametrize("name", MEMORY)
def test_a_template_cannot_take_memory(name):
    template = ChatTemplate(MEMORY[name], "some/file.jinja")
    with pytest.raises(CheckpointError, match="^some/file.jinja: .* takes more than 256 MiB of memory"):
        template.render({})


TIME = {
    "slice": "{{ 'a'|slice(99999999)|list|length }}",
    "nested range": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "squaring": "{% set n = namespace(x=99) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
    "lipsum": "{{ lipsum(n=10**6) }}",
}


@pytest.mark.parametrize("name", TIME)
def test_a_template_cannot_take_time(name, tmp_path, monkeypatch):
    text = Path(_render.__file__).read_text()
    assert "\nSECONDS = 3 " in text
    (tmp_path / "render.py").write_text(text.replace("\nSECONDS = 3 ", "\nSECONDS = 0 "))  # which a test can wait for
    monkeypatch.setattr(_render, "__file__", str(tmp_path / "render.py"))
    template = ChatTemplate(TIME[name], "some/file.jinja")
    with pytest.raises(CheckpointError, match="^some/file.jinja: .* takes more than"):
        template.render({})
    assert template._process is None


def test_a_macro_that_calls_itself_is_a_fault_and_no_crash():
    template = ChatTemplate("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "file")
    with pytest.raises(CheckpointError, match="^file: the chat template failed: RecursionError"):
        template.render({})


def test_a_conversation_may_be_larger_than_the_memory_of_a_template():
    """What the caller gives is not the template's doing."""
    text = "ü" * (8 << 20)
    assert ChatTemplate("{{ text|length }}|{{ text }}").render({"text": text}) == f"{len(text)}|{text}"


def test_the_next_conversation_is_rendered_after_any_fault():
    template = ChatTemplate("{% if text %}{{ text }}{% else %}{{ 'a'.ljust(999999999) }}{% endif %}", "file")
    assert template.render({"text": "a"}) == "a"
    for _ in range(2):
        with pytest.raises(CheckpointError, match="memory"):
            template.render({"text": ""})
        assert template.render({"text": "b"}) == "b"


@pytest.mark.parametrize(
    "value", ["a\ud800b", "\x00\U000c0000", (1, 2.5, None), [True, {3: "x"}], {"one"}, 10**40, math.inf]
)
def test_values_reach_a_template_as_they_are(value):
    assert ChatTemplate(ECHO).render({"text": value}) == str(value)


def test_subclasses_of_plain_types_are_rendered_as_such():
    class Text(str):
        pass

    class Items(list):
        pass

    assert ChatTemplate(ECHO).render({"text": Items([Text("a")])}) == "['a']"


def test_values_that_are_no_plain_data_are_refused_by_name():
    with pytest.raises(TypeError, match=r"tools\.x holds a object; a chat template reads plain data"):
        ChatTemplate(ECHO).render({"tools": {"x": [object()]}})
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(ValueError, match="tools is nested too deeply"):
        ChatTemplate(ECHO).render({"tools": deep})


def test_one_process_serves_all_conversations_and_ends_with_the_template():
    template = ChatTemplate(ECHO)
    assert template._process is None, "started at the first conversation"
    template.render({"text": "a"})
    pid = child_of(template)
    template.render({"text": "b"})
    assert child_of(template) == pid
    del template
    gc.collect()
    assert is_gone(pid)


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (signal.SIGKILL, OSError, "was ended from outside"),  # by the system, which had no memory left
        (signal.SIGSEGV, CheckpointError, "^file: .*crashed the process that renders it .SIGSEGV"),
        (signal.SIGXCPU, CheckpointError, "^file: .*takes more than 3 s"),
    ],
)
def test_a_process_that_was_ended_is_replaced(number, kind, message):
    template = ChatTemplate(ECHO, "file")
    template.render({"text": "a"})
    pid = child_of(template)
    os.kill(pid, number)
    with pytest.raises(kind, match=message):
        template.render({"text": "a"})
    assert is_gone(pid) and template.render({"text": "b"}) == "b"


def test_threads_take_turns():
    template, found = ChatTemplate(ECHO), {}

    def ask(i: int) -> None:
        found[i] = [template.render({"text": f"{i} {j}"}) for j in range(50)]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: [f"{i} {j}" for j in range(50)] for i in range(4)}


def test_copies_and_pickles_are_templates_of_their_own():
    template = ChatTemplate(ECHO, "file")
    template.render({"text": "a"})
    for other in (copy.deepcopy(template), pickle.loads(pickle.dumps(template))):  # noqa: S301
        assert other.origin == "file" and other._process is None and other.render({"text": "b"}) == "b"


def run(script: str, **arguments) -> subprocess.CompletedProcess:
    # Without the packages around the module, which import torch and take seconds.
    head = f"""
import os, sys, types
for name, path in (("idlm_kernels", {str(PACKAGE.parent)!r}), ("idlm_kernels.model", {str(PACKAGE)!r})):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [path]
from idlm_kernels.model.chat_template import ChatTemplate
t = ChatTemplate("{{{{ x }}}}")
"""
    return subprocess.run(
        [sys.executable, "-c", head + script], timeout=60, **{"capture_output": True, "text": True, **arguments}
    )


def test_a_fork_renders_in_a_process_of_its_own():
    script = """
import threading
assert t.render({"x": 1}) == "1"
first = t._process._child.pid
t._lock.acquire()  # as a thread that is not copied may hold it
child = os.fork()
if child == 0:
    ok = t.render({"x": 2}) == "2" and t._process._child.pid != first
    del t
    os._exit(0 if ok else 1)
assert os.waitpid(child, 0)[1] == 0
t._lock.release()
assert t.render({"x": 3}) == "3" and t._process._child.pid == first, "the parent's goes on"
"""
    done = run(script)
    assert done.returncode == 0, done.stderr


def test_standard_streams_that_are_closed_stay_out_of_it():
    script = """
for fd in (0, 1, 2):
    os.close(fd)
text = t.render({"x": "hi"})
fd = t._process._socket.fileno()
sys.exit(7 if text == "hi" and fd > 2 else 1)
"""
    assert run(script, capture_output=False, text=False).returncode == 7


@pytest.mark.parametrize("how", ["sys.exit(0)", "os._exit(0)", "os.kill(os.getpid(), 9)", "raise ValueError"])
def test_the_process_ends_with_its_parent(how):
    done = run(f"t.render({{'x': 1}}); print(t._process._child.pid, flush=True); {how}")
    assert is_gone(int(done.stdout), orphan=True)
    assert "Exception ignored" not in done.stderr


def test_an_interpreter_that_does_not_start_is_no_fault_of_the_template(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(OSError, match="did not start: /bin/false ended with status 1"):
        ChatTemplate(ECHO).render({"text": ""})


def test_loading_a_tokenizer_does_not_import_jinja2():
    script = "import sys, idlm_kernels.model.tokenizer; sys.exit('jinja2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0
