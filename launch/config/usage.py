"""Help of a command: its groups with their options, and every key with its default."""

from pathlib import Path


def usage(folder: Path, config_name: str, about: str, defaults: str) -> str:
    """Help of one command: its groups with their options, and every key with its default."""
    text = (folder / f"{config_name}.yaml").read_text()
    if "  - train\n" in text:  # it takes what train takes
        text += (folder / "train.yaml").read_text()
    groups = sorted(
        each for each in folder.iterdir() if each.is_dir() and f"- {each.name}:" in text
    )
    command = f"python -m launch {config_name} [group=option] [key=value] ..."
    stop = "       --cfg prints the resulting configuration and stops"
    lines = [about, "", f"usage: {command}", stop, "", "groups:"]
    lines += [
        f"  {g.name:<12}{', '.join(sorted(f.stem for f in g.glob('*.yaml')))}" for g in groups
    ]
    return "\n".join([*lines, "", "keys and defaults:", defaults])
