"""The `f2v` command: picks a sub-command and turns errors into one line and an exit status."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from shards.errors import UserError
from shards.signals import Stopped, catch_signals

# Idle OpenMP threads sleep instead of spinning. Where something else wants a core (data workers, another job), spinning
# ones steal it from the thread they wait for: training on two cores was seven times slower beside two busy processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

COMMANDS = {
    "corpus": "synthetic talking faces to try everything with",
    "build": "videos -> shards",
    "plan": "what a build would do, why, and its cost",
    "status": "what a dataset holds",
    "quarantine": "clips that are not in the shards, and why",
    "report": "a page to look at a dataset",
    "inspect": "one clip of a dataset",
    "verify": "check a dataset",
    "gc": "objects that are no longer needed",
    "export": "plain tars with chosen fields",
    "units": "centroids of speech units",
    "weights": "the part of a public checkpoint that is used",
    "train": "train on a dataset's shards",
    "vocoder": "train a vocoder on a dataset's shards",
    "synthesize": "silent video -> speech",
    "evaluate": "how good speech is, beside its reference or other systems",
    "demo": "the whole job on a synthetic corpus",
}
EVALUATIONS = ("compare", "ablations", "guidance", "listen")
"""Words that make another command of `evaluate`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 checked and found wanting, 2 the user can mend it."""
    lines = "\n".join(f"  {name:<12}{about}" for name, about in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="f2v",
        description="Talking-face videos to WebDataset shards, and shards to a video-to-speech model.",
        epilog=f"commands:\n{lines}\n\n`f2v COMMAND --help` explains each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=list(COMMANDS), metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...")
    options = parser.parse_args(argv)
    # Only the chosen command is imported, so that help and argument errors answer at once.
    name, rest = options.command, options.arguments
    if name == "evaluate" and rest and rest[0] in EVALUATIONS:
        name, rest = f"{name} {rest[0]}", rest[1:]
    module = importlib.import_module(f"cli.{name.replace(' ', '_')}")
    command = argparse.ArgumentParser(prog=f"f2v {name}", description=module.__doc__)
    module.configure(command)
    # Options may stand between SOURCE and DATASET; argparse cannot do that where there are sub-commands.
    parse = command.parse_args if options.command in ("units", "vocoder", "weights") else command.parse_intermixed_args
    arguments = parse(rest)
    catch_signals()
    try:
        return int(module.run(arguments))
    except UserError as error:
        print(f"f2v {name}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of our output is gone (`f2v status | head`); say nothing more, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("cli", "model", "pipeline", "shards"):
            raise
        storage = error.name in ("obstore", "boto3")
        hint = f"pip install 'faces2voices[{'s3' if storage else 'demo'}]' brings it"
        print(f"f2v {name}: the package {error.name!r} is not installed; {hint}", file=sys.stderr)
        return 2
    except OSError as error:
        # Full disks, missing permission, a file where a folder should be: the machine's words are the clearest.
        where = f"{error.filename}: " if error.filename else ""
        print(f"f2v {name}: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    except Stopped as stop:
        print(f"f2v {name}: stopped; run the same command again to go on", file=sys.stderr)
        return 128 + stop.number


if __name__ == "__main__":
    sys.exit(main())
