"""GenEval's tasks in the words of the embedded world, from its held-out captions."""

from __future__ import annotations

from drmcli.measure.geneval import Clause, Item
from drmcli.tiny import world


def items(per_task: int = 40) -> list[Item]:
    """Prompts of five of the six tasks; counting is left out, since the world has no words for numbers.

    Classes are shapes. In the tasks of two objects their shapes differ, so that neither can be taken for the other.
    """
    parsed = [(text, world.parse(text)) for text in world.captions("test")]
    single = [(text, c.things) for text, c in parsed if c.relation is None]
    double = [(text, c) for text, c in parsed if c.relation is not None and c.things[0].shape != c.things[1].shape]
    half = len(single) // 2
    made = [Item("single_object", text, (Clause(thing.shape, 1),)) for text, (thing,) in single[:half][:per_task]]
    made += [
        Item("colors", text, (Clause(thing.shape, 1, thing.color),)) for text, (thing,) in single[half:][:per_task]
    ]
    for number, tag in enumerate(("two_object", "position", "color_attr")):
        for text, c in double[number * per_task : (number + 1) * per_task]:
            a, b = c.things
            colored = tag == "color_attr"
            second = Clause(b.shape, 1, b.color if colored else None)
            where = (c.relation, 0) if tag == "position" and c.relation else None
            made.append(Item(tag, text, (second, Clause(a.shape, 1, a.color if colored else None, where))))
    return made
