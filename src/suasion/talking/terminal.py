"""The conversation in a terminal: replies side by side where the window is wide enough, below one another where it is not."""

from __future__ import annotations

import re
from collections.abc import Callable

from rich.columns import Columns
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.segment import Segment
from rich.text import Text

from suasion.errors import UserError
from suasion.talking.talk import Round, Talk

HELP = "/names shows who is who, /new begins again, /quit ends; Ctrl-C stops a reply"
NARROWEST = 36  # columns of a reply beside others
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a reply may not steer the terminal


def chat(talk: Talk, console: Console, ask: Callable[[str], str]) -> None:
    """Ask for messages and show the replies until the person quits. ask: prompt -> the line typed (EOFError quits)."""
    console.print(f"{talk.title}: {', '.join(map(talk.label, range(len(talk.names))))}. {HELP}.", markup=False)
    while True:
        try:
            line = ask("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line in ("/quit", "/q"):
            return
        if line == "/names":
            talk.reveal()
            for place, name in enumerate(talk.names):
                console.print(f"{chr(ord('A') + place)}: {name}", markup=False)
        elif line == "/new":
            talk.begin(talk.names, talk.blind)
            console.print("A new conversation.")
        elif line.startswith("/"):
            console.print(HELP)
        elif line:
            try:
                answer(talk, line, console)
            except UserError as error:
                console.print(str(error), style="yellow", markup=False)


def answer(talk: Talk, message: str, console: Console) -> None:
    """One round, shown as it grows, and whole when it ends; Ctrl-C stops it."""
    said: dict[int, str] = {}
    if not console.is_terminal:
        _print_round(talk, talk.say(message, lambda place, text: None), console)
        return
    empty = Tail(side_by_side(talk, said, {}, console.width))
    with Live(empty, console=console, refresh_per_second=8, transient=True) as live:

        def hear(place: int, text: str) -> None:
            said[place] = text
            live.update(Tail(side_by_side(talk, said, {}, console.width)))

        this = talk.say(message, hear)
    replies = {place: reply.text for place, reply in this.replies.items()}
    console.print(
        side_by_side(talk, said | replies, {place: reply.finish for place, reply in this.replies.items()}, console.width)
    )


class Tail:
    """The last lines of something, as many as the window has: a terminal cannot take back what has left it at the top, so that replies
    longer than the window would be there once for every token."""

    def __init__(self, whole: RenderableType):
        self.whole = whole

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The lines, for rich."""
        for line in console.render_lines(self.whole, options, pad=False)[-max(console.height - 1, 1) :]:
            yield from line
            yield Segment.line()


def side_by_side(talk: Talk, said: dict[int, str], finish: dict[int, str], width: int) -> Columns:
    """Panels of equal width, one a model."""
    count = len(talk.names)
    each = width // count - 1 if width // count > NARROWEST else width
    panels = []
    for place in range(count):
        note = {"length": "at the limit", "stopped": "stopped"}.get(finish.get(place, ""), "")
        text = Text(CONTROL.sub("", said.get(place, "...")))
        panels.append(Panel(text, title=Text(talk.label(place)), subtitle=Text(note), width=each))
    return Columns(panels, padding=(0, 1))


def _print_round(talk: Talk, this: Round, console: Console) -> None:
    for place, reply in sorted(this.replies.items()):
        console.print(f"{talk.label(place)}: {CONTROL.sub('', reply.text)}", markup=False, soft_wrap=True)
