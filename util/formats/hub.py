"""Upload to the Hugging Face Hub."""

from pathlib import Path

from util.files import import_package


def push(folder: Path, name: str) -> None:
    """Upload a folder to the Hugging Face Hub. A new repository is private. OSError if the upload fails."""
    hub = import_package("huggingface_hub", f"--push_to_hub {name}")
    try:
        api = hub.HfApi()
        api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder)
    except Exception as error:  # network, hub and name errors have no common class
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise OSError(f"--push_to_hub {name}: {reason}; {folder} is complete, upload it by hand") from error
