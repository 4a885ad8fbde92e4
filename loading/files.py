"""Files and hubs: where a file is found, how JSON is read, how nothing half-written is ever met."""
import json
import os
from contextlib import contextmanager, suppress
from pathlib import Path
from safetensors import SafetensorError
from safetensors.torch import save_file

class UserError(Exception):
    """Something the user can mend: the text says what was wrong and what to do. Scripts print it and exit with 2."""

def model_name(name_or_path) -> str:
    """How a model is named in what is written down: a folder by its own name without its path, a hub id whole."""
    return Path(name_or_path).resolve().name if Path(name_or_path).is_dir() else str(name_or_path)

def locate(name_or_path, filename: str, revision=None, required=True, repo_type="model") -> Path | None:
    """The local path of one file of a model: a folder's, or downloaded from the hub (only the requested files)."""
    try:
        folder = Path(name_or_path).expanduser()
        folder.exists()
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"{str(name_or_path)[:80]} is not a folder: {error}") from error
    if (folder / filename).is_file():
        return folder / filename
    if folder.is_dir():
        if not required:
            return None
        raise UserError(f"{folder} has no {filename}: give a folder in Hugging Face layout")
    if folder.exists() or str(name_or_path).startswith((".", "/", "~")) or str(name_or_path).count("/") != 1:
        raise UserError(f"{name_or_path} is not a folder: give a model folder or a hub id such as Maykeye/TinyLLama-v0")
    return download(str(name_or_path), filename, revision, required, repo_type)

def download(repo: str, filename: str, revision, required: bool, repo_type: str) -> Path | None:
    from huggingface_hub import errors, hf_hub_download
    try:
        return Path(hf_hub_download(repo, filename, revision=revision, repo_type=repo_type))
    except errors.EntryNotFoundError as error:
        if not required:
            return None                              # offline: the cache has what an earlier run needed
        if not isinstance(error, errors.LocalEntryNotFoundError):
            raise UserError(f"{repo} on the hub has no {filename}") from error
        raise UserError(f"{repo}: the hub can't be reached and {filename} is not in its cache; "
                        "give a local folder or try again with a network") from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{repo}: no such folder here, and the hub says: {reason}") from error

def read_json(path) -> dict:
    """A JSON object; UserError says which file is missing or damaged, and where."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a JSON {type(data).__name__}, expected an object")
    return data

@contextmanager
def replacing(*paths):
    """Temporary paths to write to, renamed to `paths` when all is written: no reader ever meets half a file."""
    paths = [Path(path) for path in paths]
    temporary = [path.parent / f".tmp{os.getpid()}.{path.name}" for path in paths]
    at = paths[0]
    try:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        umask = os.umask(0o077)
        os.umask(umask)
        for at, written in zip(paths, temporary, strict=True):
            written.chmod(0o666 & ~umask)            # safetensors makes files that only their owner may read
            os.replace(written, at)
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
