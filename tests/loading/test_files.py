"""What may be written and read: never over a device or a source, a link stays a link, and nothing without an end."""
import json
import os
import socket
import stat
import time
from pathlib import Path

import pytest

from loading import documents, files
from loading.files import UserError, keep_sources, read_bytes, writable, write_json


def device(path):
    """Endless zeros, as /dev/zero."""
    if os.geteuid():
        pytest.skip("only root makes devices")
    os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))


def bound(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))        # a long path is none for a socket


SPECIAL = {"device": device, "fifo": os.mkfifo, "socket": bound, "loop": lambda path: path.symlink_to(path),
           "folder": Path.mkdir}


@pytest.fixture
def work(tiny_folder, tmp_path, monkeypatch):
    """A folder with texts, and what each command is given to write to `out` there."""
    monkeypatch.chdir(tmp_path)
    Path("o.txt").write_text("\n".join(f"the dog {i}" for i in range(8)))
    Path("s.txt").write_text("\n<|endoftext|>\n".join(f"the dog saw a cat {i}" for i in range(8)))
    model = ["--model", tiny_folder]
    return {"trace": ["generate", *model, "--prompt", "a", "--max-new-tokens", 2, "--trace", "out"],
            "tree": ["generate", *model, "--tune", "o.txt", "--max-new-tokens", 8, "--tree", "out", "--threads", 1],
            "tokens": ["prepare_data", *model, "--text", "s.txt", "--out", "out"],
            "heads": ["train_heads", *model, "--data", "d", "--epochs", 1, "--num-heads", 1, "--out", "out"]}


@pytest.mark.parametrize("kind", SPECIAL)
def test_only_a_regular_file_is_replaced(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x"
    SPECIAL[kind](path)
    before = path.lstat()
    for name in path, Path("x"), tmp_path / "link":
        if name.name == "link":
            name.symlink_to(path)
        with pytest.raises(UserError, match=f"can't write .*{name.name}: it is not a regular file"):
            write_json(name, {})
    assert path.lstat() == before and sorted(os.listdir(tmp_path)) == ["link", "x"]


@pytest.mark.parametrize("kind", ["fifo", "device"])
@pytest.mark.parametrize("what, name", [("trace", "out"), ("tree", "out"), ("tokens", "out"), ("tokens", "out.loss"),
                                        ("tokens", "out.starts"), ("tokens", "out.json"), ("heads", "out/config.json"),
                                        ("heads", "out/tree.json"), ("heads", "out/metrics.jsonl")])
def test_no_command_replaces_a_device(kind, what, name, work, cli):
    if what == "heads":
        assert cli(*work["tokens"][:-1], "d")[0] == 0
        Path("out").mkdir()
    SPECIAL[kind](Path(name))
    before = Path(name).lstat().st_ino
    status, _, err = cli(*work[what])
    assert status == 2 and f"can't write {name}: it is not a regular file" in err.splitlines()[-1], err
    assert Path(name).lstat().st_ino == before and not Path("out.bin").exists()


@pytest.mark.parametrize("there", [True, False], ids=["", "dangling"])
def test_links_stay_links(there, work, cli):
    assert cli(*work["tokens"][:-1], "d")[0] == 0
    Path("far").mkdir()
    Path("out").mkdir()
    links = [Path(name) for name in ("t.json", "new", "new.json", "new.loss", "out/tree.json", "out/config.json")]
    for link in links:
        link.symlink_to(Path("far", link.name) if link.parent == Path(".") else Path("../far", f"of-{link.name}"))
        if there and link.suffix:
            link.write_text("{}")
    for command in (work["trace"][:-1] + ["t.json"], work["tokens"][:-1] + ["new"], work["heads"]):
        status, _, err = cli(*command)
        assert status == 0, err
    for link in links:
        assert link.is_symlink() and link.is_file() and link.stat().st_size > 2, link
    assert json.loads(Path("new.json").read_text())["documents"] == 8
    assert json.loads(Path("far/of-config.json").read_text())["medusa_num_heads"] == 1


@pytest.mark.parametrize("name", ["a\0b", "\ud800.json", "a" * 300])
def test_names_that_no_file_can_have(name, tmp_path):
    with pytest.raises(UserError, match="can't write"):
        write_json(tmp_path / name, {})


# ------------------------------------------------------------------------------------------------------------- sources

def linked(source, path):
    path.symlink_to(source)


@pytest.mark.parametrize("make", [None, linked, lambda source, path: os.link(source, path)], ids=["", "link", "hard"])
@pytest.mark.parametrize("option, source, text", [
    ("--sharegpt", "q.json", '[{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]'),
    ("--text", "q.loss", "the dog"), ("--text", "q", "the dog"), ("--openings", "q.starts", "the dog"),
    ("--openings", "q.partial", "the dog"), ("--sharegpt", "./q.json", "[]")])
def test_no_source_of_a_token_file_is_written_over(make, option, source, text, work, cli):
    Path(source).write_text(text)
    if make:
        given = Path(f"source{Path(source).suffix}")
        Path(source).rename(given)
        make(given, Path(source))
        source = given
    status, out, err = cli(*work["tokens"][:3], option, source, "--out", "q")
    assert status == 2 and "is the source itself" in err and not out and Path(source).read_text() == text
    assert not {"q.loss", "q.json", "q.starts"} - {Path(source).name} & set(os.listdir()) or make


def test_no_file_of_a_model_or_of_heads_is_written_over(work, tiny_folder, cli):
    inputs = {path: path.read_bytes() for path in tiny_folder.rglob("*") if path.is_file()}
    Path("hub").mkdir()
    Path("hub/TinyStoriesV2-GPT4-train.txt").write_text("the dog")
    assert cli(*work["tokens"][:-1], "d")[0] == 0
    for name, source in (("out/config.json", tiny_folder / "config.json"), ("out/metrics.jsonl", "d.loss"),
                         ("out/medusa/tree.json", "d")):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        os.link(source, name)
        status, _, err = cli(*work["heads"])
        assert status == 2 and f"{name} is the source itself" in err
        Path(name).unlink()
    for command in (
            [*work["tokens"][:-1], tiny_folder / "config"], [*work["tokens"][:-1], tiny_folder / "tokenizer"],
            [*work["tokens"][:3], "--openings", "o.txt", "--heads", tiny_folder / "medusa", "--out",
             tiny_folder / "medusa/config"],
            [*work["tokens"][:3], "--tinystories", "hub", "--out", "hub/TinyStoriesV2-GPT4-train.txt"],
            [*work["trace"][:-1], tiny_folder / "config.json"], [*work["tree"][:-3], "o.txt"],
            [*work["trace"][:-1], tiny_folder / "medusa/model.safetensors"]):
        status, _, err = cli(*command)
        assert status == 2 and "is the source itself" in err, (command, err)
    for out in (tiny_folder, tiny_folder / "medusa"):
        status, _, err = cli("train_heads", "--export", "vllm", tiny_folder / "medusa", "--model", tiny_folder,
                             "--out", out)
        assert status == 2 and ("nothing is written over" in err or "own folder" in err)
    assert {path: path.read_bytes() for path in tiny_folder.rglob("*") if path.is_file()} == inputs
    assert Path("hub/TinyStoriesV2-GPT4-train.txt").read_text() == "the dog"
    again = [*work["tokens"][:-1], tiny_folder / "again.bin"]                    # its own results are
    assert cli(*again)[0] == cli(*again)[0] == 0


def test_a_file_of_the_users_is_no_stopped_run(work, cli):
    Path("q.partial").write_text("my notes\nof today")
    status, _, err = cli(*work["tokens"][:3], "--openings", "o.txt", "--out", "q")
    assert status == 2 and "q.partial is left from a stopped run" in err
    assert Path("q.partial").read_text() == "my notes\nof today"


# ------------------------------------------------------------------------------------------------ what is read at once

@pytest.mark.parametrize("kind, says", [("device", "it is a device"), ("fifo", ""), ("folder", "Is a directory")])
@pytest.mark.parametrize("option", ["--tree", "--prompts-file", "--tune", "--text", "--openings", "--sharegpt"])
def test_what_has_no_end_is_not_read(kind, says, option, work, cli):
    name = "x.json" if option == "--sharegpt" else "x"
    SPECIAL[kind](Path(name))
    script = "generate" if option in ("--tree", "--prompts-file", "--tune") else "prepare_data"
    begin = time.perf_counter()
    status, out, err = cli(script, *work["trace"][1:3], option, name, *(["--out", "y"] if script != "generate" else []))
    assert status == 2 and not out and "Traceback" not in err and says in err.splitlines()[-1]
    assert time.perf_counter() - begin < 5 and not Path("y").exists()


def test_a_pipe_with_a_writer_is_read_to_its_end(work, cli):
    read, write = os.pipe()
    os.write(write, b"the dog\na cat\n")
    os.close(write)
    out = cli("generate", *work["trace"][1:3], "--prompts-file", f"/dev/fd/{read}", "--max-new-tokens", 2, "--json")[1]
    os.close(read)
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["the dog", "a cat"]


def test_no_more_than_a_limit_is_read_at_once(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_text("ab\ncd\n\nefghij")
    assert read_bytes(path, 13) == b"ab\ncd\n\nefghij"
    with pytest.raises(OSError, match="larger than"):
        read_bytes(path, 12)
    assert list(documents.read_lines(path, 13, 3)) == ["ab\n", "cd\n", "\n", "efg", "hij"]
    with pytest.raises(UserError, match="holds more than"):
        list(documents.read_lines(path, 12))
    os.truncate(path, 2 ** 40)
    with pytest.raises(UserError, match="can't read the tree .*larger than 17 MB"):
        files_tree(path)
    monkeypatch.setattr(documents, "BATCH", 1000)
    assert len(next(documents.texts_between(path, "--"))) <= 2020                # of a line without an end: pieces


def files_tree(path):
    from loading.trees import parse_tree
    return parse_tree(path)


def test_sources_that_are_not_there_are_no_obstacle(tmp_path):
    keep_sources([None, tmp_path / "x"], [None, "", "some/model", "[[0], [1]]" * 999, tmp_path / "none"])
    (tmp_path / "x").write_text("x")
    (tmp_path / "tokenizer.json").symlink_to("nowhere")
    (tmp_path / "tokens.bin.json").write_text("{}")
    keep_sources([tmp_path / "x", tmp_path / "tokens.bin.json"], [tmp_path])     # no files of a model's
    (tmp_path / "nowhere").write_text("x")
    with pytest.raises(UserError, match="nowhere is the source itself"):
        keep_sources([tmp_path / "nowhere"], [tmp_path])
    assert writable(tmp_path / "x") == tmp_path / "x" and files.MODEL_FILES
