"""A command line with something wrong, and what is expected of it.

A case is wrong by construction: it says what was done to a command that works, and no rule of the program is asked.
Five things may be expected:

* `REFUSED`: an error, a documented exit code, and nothing made;
* `HARMLESS`: it looks odd but says the same as another command, and must end as that one does;
* `EITHER`: chance decided what was hit, so that it is refused or ends as the sound command does;
* `PARTIAL`: a part of many is wrong; the rest is done as without that part, and exit code 6 says so;
* `FULL`: work is done, and then there is no room to say so: an error, but nothing that was made is lost.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from damage import Damage

REFUSED, HARMLESS, EITHER, PARTIAL, FULL = "refused", "harmless", "either", "partial", "full"
ANY_ERROR = (2, 3, 4, 5, 6)
"""What the README documents for errors that a user can cause."""


@dataclass(frozen=True)
class Case:
    """A command line with something wrong.

    Args:
        kind: family, for counting.
        why: what is wrong.
        argv: words; @out@, @files@ and @place@ are folders of the case.
        damages: what is done to files before.
        env: variables of the environment.
        expect: see the module.
        codes: exit codes that an error may have.
        clean: the command whose outcome a harmless one has; its own without the damage where this is empty.
        clean_damages: what is done to files before that command.
        conf: the program reads `files/conf`.
        stdout, stderr: where they go.
        errors: how many errors are told at most; a single fault is told once.
    """

    kind: str
    why: str
    argv: tuple[str, ...]
    damages: tuple[Damage, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    expect: str = REFUSED
    codes: tuple[int, ...] = ANY_ERROR
    clean: tuple[str, ...] = ()
    clean_damages: tuple[Damage, ...] = ()
    conf: bool = False
    stdout: str = ""
    stderr: str = ""
    errors: int = field(default=1, compare=False)

    def __str__(self) -> str:
        """What a failure is called by."""
        words = [word if len(word) < 100 else f"{word[:60]}...({len(word)})" for word in self.argv]
        where = "; ".join(f"{damage.path} is {damage.how} ({damage.seed})" for damage in self.damages)
        env = " ".join(f"{key}={value[:60]!r}" for key, value in self.env)
        return f"[{self.kind}] {self.why[:200]!r}: {env} heatkv {' '.join(map(repr, words))} {where}"


LONG = 5000
CONTROL = ("\x1b[31mred\x1b[0m", "\x07\x08", "a\nb", "\u202eabc", "\udc80", "caf\u00e9\u0301", "\U0001f600", "\x9b2J")
"""Texts that would drive a terminal, or that no encoding has."""
