"""What the ablation found, as Markdown tables."""

from __future__ import annotations

from typing import Any

from benchmarks.relevance.ablation import DEFAULT_RULE, DRAWS

#: What tells one choice from another.
KEYS = ("dress", "pooling", "layers", "dreams", "prompts", "dressed", "framed", "penalty")


def text(content: dict[str, Any]) -> str:
    """All tables of one model."""
    default, best = (one(content, content[name]) for name in ("default", "best"))
    parts = [
        f"## {content['model']}\n",
        f"Fitted to: {', '.join(f'{count} {name}' for name, count in content['fit'].items())}. "
        f"Layers: {', '.join(f'{name} {number}' for name, number in content['layers'].items())}.\n",
        f"### Share sent to the base, validation\n\nA: {words(default)}. B: {words(best)}.\n",
        shares(content["sets"], [default, best]),
    ]
    if "test" in content:
        parts += ["### Share sent to the base, test\n", shares(content["test_sets"], content["test"])]
    parts += [f"### Drawn anew, {DRAWS} times\n", draws(content["drawn"])]
    parts += [
        f"### Choices\n\nMean share that goes right over the task's sets and over the base's, border {DEFAULT_RULE}.\n",
        choices(content),
    ]
    return "\n".join(parts)


def one(content: dict[str, Any], choice: dict[str, Any]) -> dict[str, Any]:
    """The result of a choice."""
    return next(found for found in content["choices"] if all(found[key] == choice[key] for key in KEYS))


def words(choice: dict[str, Any]) -> str:
    """A choice in a line."""
    return (
        f"fitted to {choice['dress']}; {choice['pooling']} of {choice['layers']}; {choice['dreams']} dreams; "
        f"{choice['prompts']} prompts, {choice['dressed']:g} of them in other dresses; "
        f"{choice['framed']:g} of the dreams in forms; penalty {choice['penalty']:g}"
    )


def shares(sets: dict[str, Any], found: list[dict[str, Any]]) -> str:
    """A row a set; a column for each rule of each choice."""
    names = dict(zip("AB", found, strict=False))
    columns = [(f"{letter}: {rule}", made["rules"][rule]) for letter, made in names.items() for rule in made["rules"]]
    lines = [["set", "prompts", "wanted", *(name for name, _ in columns)], ["---"] * (3 + len(columns))]
    for place, (name, (wanted, count)) in enumerate(sets.items()):
        lines.append([name, str(count), wanted, *(f"{rule['shares'][place]:.2f}" for _, rule in columns)])
    for side in ("task", "base"):
        lines.append([f"right, {side}", "", "", *(f"{rule[side]:.3f}" for _, rule in columns)])
    return rows(lines)


def draws(found: list[dict[str, Any]]) -> str:
    """A row for each of the values drawn for: mean share right ± its deviation, and that of the worst set."""
    keys = ("pooling", "framed", "penalty", "prompts", "border")
    lines = [[*keys, "task", "worst", "base", "worst"], ["---"] * (len(keys) + 4)]
    for made in found:
        own = [str(made[key]) for key in keys]
        for side in ("task", "base"):
            own += [f"{made[side]['mean']:.3f} ± {made[side]['deviation']:.3f}", f"{made[side]['worst']:.3f}"]
        lines.append(own)
    return rows(lines)


def choices(content: dict[str, Any]) -> str:
    """A row a choice, the best first."""
    lines = [[*KEYS, "task", "base", "AUC", "worst AUC"], ["---"] * (len(KEYS) + 4)]
    for found in sorted(content["choices"], key=lambda found: -found["rules"][DEFAULT_RULE]["right"]):
        rule = found["rules"][DEFAULT_RULE]
        figures = [rule["task"], rule["base"], found["auc"], found["worst_auc"]]
        lines.append([*(str(found[key]) for key in KEYS), *(f"{figure:.3f}" for figure in figures)])
    return rows(lines)


# -- further tasks ---------------------------------------------------------------------------------------------------


def free_text(content: dict[str, Any]) -> str:
    """The tables of `free`: what each choice comes to, and where the default one sends each set."""
    tasks, default = content["tasks"], content["default"]
    told = ", ".join(f"{key} {told_value(value)}" for key, value in default.items())
    counted = (
        f"{name}: {task['fit']} to fit and {task['held_out']} held out"
        + (f" in {task['folds']} folds" if task["folds"] > 1 else "")
        for name, task in tasks.items()
    )
    lines = [[*default, *(f"{name}: {figure}" for name in tasks for figure in content["figures"])]]
    lines.append(["---"] * len(lines[0]))
    for choice in content["choices"]:
        named = [told_value(choice[key]) for key in default]
        lines.append([*named, *(f"{figure:.3f}" for name in tasks for figure in choice[name])])
    sent = [["set", "prompts", *tasks], ["---"] * (2 + len(tasks))]
    for name in dict.fromkeys(name for shares in content["sent"].values() for name in shares):
        own = [content["sent"][task].get(name) for task in tasks]
        count = str(content["sets"].get(name, ""))
        sent.append([name, count, *("" if share is None else f"{share:.2f}" for share in own)])
    return "\n".join(
        [
            f"## {content['model']}, free writing and other templates\n",
            f"{'; '.join(counted)}. Seeds of dreams: {', '.join(map(str, content['dreams']))}.\n",
            "### Share of held-out prompts kept (mean and worst of all heads), mean share of other sets sent to the base\n",
            rows(lines),
            f"### Share sent to the base, {told}\n",
            rows(sent),
            "### With anchors\n",
            anchors(content),
        ]
    )


def anchors(content: dict[str, Any]) -> str:
    """A row for each task, set of anchors and number of them."""
    lines = [["task", "anchors of", "how many", "weighed", *content["anchored"]]]
    lines.append(["---"] * len(lines[0]))
    for found in content["anchors"]:
        named = [found["task"], found["set"], str(found["count"]), told_value(found["weighed"])]
        lines.append([*named, *(f"{figure:.3f}" for figure in found["figures"])])
    return rows(lines)


def told_value(value: str | float) -> str:
    """One of a choice's values."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else f"{value:.3g}"


def rows(lines: list[list[str]]) -> str:
    """A table."""
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
