"""The card of a set: what it is, and how it is served."""

from composer.formats.sets.adapter_set import SET_FILE, AdapterSet


def set_card(made: AdapterSet) -> str:
    """The README.md of a set."""
    rows = [f"| `{name}` | {member.repository} | {member.version} |" for name, member in sorted(made.members.items())]
    lines = [
        "---\nlibrary_name: adaptory\n---",
        f"# A set of {len(made.members)} adapters",
        "No weights are combined: a router sends each prompt to the adapter whose fitting prompts it resembles most, "
        "or to the base.",
        "| prompts of | adapter | version |\n|---|---|---|\n" + "\n".join(rows),
        f"`{SET_FILE}` has the members by commit and the router. `adaptory mirror` loads the members of a set that a "
        "channel serves, and `adaptory route` chooses one of them for each request.",
    ]
    return "\n\n".join(lines) + "\n"
