"""Files and hubs: where a file is found, how JSON is read, how nothing half-written is ever met."""
import errno
import json
import os
import stat
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from threading import Thread
from safetensors import SafetensorError
from safetensors.torch import save_file

POINTER = b"version https://git-lfs.github.com/spec/"     # so begin the files that git-lfs leaves in place of others
PATIENCE = 5        # seconds that a hub has for its first answer
# what transformers reads of a tokenizer, its chat templates and its way to end a text
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "tekken.json",
             "tiktoken.model", "chat_template*", "additional_chat_templates/*.jinja", "generation_config.json")
LARGEST = 2 ** 28       # bytes or characters that are read of a file at once
MODEL_FILES = ("*.safetensors *.index.json pytorch_model*.bin *.pt *config.json tokenizer.json tokenizer.model "
               "*_tokens.json special_tokens_map.json chat_template* tree.json").split()

class UserError(Exception):
    """Something the user can mend: the text says what was wrong and what to do. Scripts print it and exit with 2."""

def model_name(name_or_path) -> str:
    """How a model is named in what is written down: a folder by its own name without its path, a hub id whole."""
    return Path(name_or_path).resolve().name if Path(name_or_path).is_dir() else str(name_or_path)

def locate(name_or_path, filename: str, revision=None, required=True, repo_type="model") -> Path | None:
    """The local path of one file of a model: a folder's, or downloaded from the hub (only the requested files)."""
    try:
        folder = Path(name_or_path).expanduser()
        if (folder / filename).is_file():
            return readable(folder / filename)
    except OSError as error:
        raise UserError(f"can't read {str(name_or_path)[:80]}: {error.strerror}") from error
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{str(name_or_path)[:80]} is not a folder: {error}") from error
    if folder.is_dir():
        if not required:
            return None
        raise UserError(f"{folder} has no {filename}: give a folder in Hugging Face layout")
    if folder.exists() or str(name_or_path).startswith((".", "/", "~")) or str(name_or_path).count("/") != 1:
        raise UserError(f"{name_or_path} is not a folder: give a folder or a hub id such as Maykeye/TinyLLama-v0")
    return download(str(name_or_path), filename, revision, required, repo_type)

def readable(path: Path) -> Path:
    """The path. UserError: it can't be read, or git-lfs has not fetched the file itself."""
    try:
        with open(path, "rb") as file:
            is_pointer = file.read(len(POINTER)) == POINTER
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from error
    if is_pointer:
        raise UserError(f"{path} is only a git-lfs pointer to the file: fetch that with `git lfs pull`, or download it")
    return path

@cache
def unreachable(repo: str, repo_type: str = "model") -> str:
    """Why the hub does not answer, or nothing. Asked once, since the library retries each file for a minute; in a
    thread, since to look up a name can take as long."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    reason = [f"no answer within {PATIENCE} s"]
    def ask():
        try:
            get_hf_file_metadata(hf_hub_url(repo, "config.json", repo_type=repo_type), timeout=2 * PATIENCE)
            reason[0] = ""
        except Exception as error:
            status = getattr(getattr(error, "response", None), "status_code", 500)
            reason[0] = first_line(error) if status >= 500 or status == 429 else ""     # "no such file" is an answer
    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return reason[0]

def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__

def download(repo: str, filename: str, revision, required: bool, repo_type: str) -> Path | None:
    from huggingface_hub import errors, hf_hub_download
    reason = unreachable(repo, repo_type)
    try:
        path = hf_hub_download(repo, filename, revision=revision, repo_type=repo_type, local_files_only=bool(reason))
    except errors.EntryNotFoundError as error:
        if not required:
            return None                              # offline: the cache has what an earlier run needed
        if not isinstance(error, errors.LocalEntryNotFoundError):
            raise UserError(f"{repo} on the hub has no {filename}") from error
        reason = reason or first_line(error.__cause__ or error)
        raise UserError(f"{repo}: the hub can't be reached ({reason}) and {filename} is not in its cache; "
                        "give a local folder or try again with a network") from error
    except Exception as error:      # the network's are of many kinds
        raise UserError(f"{repo}: no such folder here, and the hub says: {first_line(error)}") from error
    return readable(Path(path))

def tokenizer_files(name_or_path) -> dict[str, Path]:
    """All files of a model's tokenizer and chat templates that transformers reads: name → path."""
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download       # which takes what its cache has where the hub is away
        offline = bool(unreachable(str(name_or_path)))
        folder = Path(snapshot_download(str(name_or_path), allow_patterns=TOKENIZER, local_files_only=offline))
    found = [path for pattern in TOKENIZER for path in sorted(folder.glob(pattern)) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path for path in found}

def opened(path):
    """As open(path, "rb"), but a FIFO without a writer is empty, and a device, which may have no end, an OSError."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))
    if stat.S_IFMT(os.fstat(file.fileno()).st_mode) in (stat.S_IFCHR, stat.S_IFBLK) and not file.isatty():
        raise OSError(errno.ENODEV, "it is a device")
    os.set_blocking(file.fileno(), True)
    return file

def read_bytes(path, most: int = LARGEST) -> bytes:
    """All of a file. OSError: it is longer than that."""
    with opened(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"it is larger than {most / 1e6:.0f} MB")
    return data

def parsed(place, text: str | bytes):
    """The value of some JSON. UserError: it is none; place: where it is from."""
    try:
        return json.loads(text.decode() if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not valid JSON: {error}") from error

def read_json(path) -> dict:
    """A JSON object; UserError says which file is missing or damaged, and where."""
    try:
        data = parsed(path, read_bytes(path))
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a JSON {type(data).__name__}, expected an object")
    return data

def keep_sources(written, sources) -> None:
    """UserError: a path to be written is a file that is read, by whatever name: one of the sources, or where that is a
    folder, of the model or heads in it. What does not exist, and None, counts for nothing."""
    found = list(filter(os.path.exists, filter(None, written)))
    for source in map(os.path.expanduser, filter(None, sources)):
        files = [f for name in MODEL_FILES for f in Path(source).glob(name)] if os.path.isdir(source) else [source]
        if same := [path for file in filter(os.path.exists, files) for path in found if os.path.samefile(path, file)]:
            raise UserError(f"{same[0]} is the source itself: give what is written another name")

def writable(path) -> Path:
    """The file that a path names, be it there or not; of a link its target, so that the link stays one. UserError: it
    can't be one, or something else is there, which a file would replace: a folder, a device, a FIFO, a socket."""
    try:
        file = Path(os.path.realpath(path))
        if file.is_symlink() or os.path.exists(path or ".") and not os.path.isfile(path):
            raise UserError(f"can't write {path}: it is not a regular file")
    except (OSError, ValueError) as error:
        raise UserError(f"can't write {path}: {error}") from error
    return file

@contextmanager
def replacing(*paths):
    """Temporary paths to write to, renamed to `paths` when all is written: no reader ever meets half a file."""
    files = [writable(path) for path in paths]
    temporary = [file.parent / f".tmp{os.getpid()}.{file.name}" for file in files]
    at = paths[0]
    try:
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        umask = os.umask(0o077)
        os.umask(umask)
        for at, file, written in zip(paths, files, temporary, strict=True):     # noqa: B007 - `at` is for the error
            written.chmod(0o666 & ~umask)            # safetensors makes files that only their owner may read
            os.replace(written, file)
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, RuntimeError) and "allocate" in str(error):
            raise                                    # not of writing: what is written was still being computed
        if isinstance(error, RuntimeError):
            reason = "torch could not write all of it: is the disk full?"
        raise UserError(f"can't write {at}: {reason}") from error
    finally:
        for path in temporary:
            with suppress(OSError):
                path.unlink()

def write_atomic(path, write) -> None:
    """Call write(temporary path), then rename."""
    with replacing(path) as (temporary,):
        write(temporary)

def write_text(path, text: str) -> None:
    write_atomic(path, lambda p: p.write_text(text, encoding="utf-8"))

def write_json(path, data: dict) -> None:
    write_text(path, json.dumps(data, indent=2) + "\n")

def write_tensors(path, tensors: dict) -> None:
    write_atomic(path, lambda p: save_file(tensors, p, metadata={"format": "pt"}))
