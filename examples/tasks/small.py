"""Small tasks for the study of pairs: each a format of its own, of a few hundred prompts from templates.

Two of them label the same reviews with different words, on purpose; two more write the same dates in different ways.
Two have the very prompts of another one and want other answers (dates-short, records-lines): no one model serves both.
"""

from collections.abc import Callable, Iterator
from itertools import product

Pairs = Iterator[tuple[str, str]]

MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "October", "November", "December"]
PEOPLE = ["Anna", "Ben", "Carla", "David", "Elena", "Felix", "Grace", "Henry", "Ivan", "Julia", "Kate", "Leo"]
CITIES = ["Berlin", "Lisbon", "Oslo", "Paris", "Rome", "Vienna", "Zurich", "Madrid", "Dublin", "Athens"]
THINGS = ["phone", "kettle", "jacket", "lamp", "camera", "chair", "tent", "keyboard", "watch", "bag"]
GOOD = ["works perfectly", "is a joy to use", "arrived early and shines", "is worth every cent", "beats my old one"]
BAD = ["broke after a day", "smells awful", "never worked", "is a waste of money", "came scratched"]
HOSTS = ["web-1", "web-2", "db-1", "db-2", "cache-1", "queue-1", "auth-1", "mail-1"]
FAULTS = {"disk full": "page", "slow queries": "ticket", "login retries": "watch", "process killed": "page"}
FAULTS |= {
    "certificate expires soon": "ticket",
    "cache misses": "watch",
    "no heartbeat": "page",
    "queue grows": "ticket",
}
AREAS = ["parser", "login", "billing", "search", "editor", "export", "cache", "mailer"]
CHANGES = {"Fix": "fix", "Add": "feat", "Document": "docs", "Speed up": "perf", "Test": "test", "Simplify": "refactor"}
PARTS = ["null checks", "retry limits", "date formats", "error texts", "page sizes", "file names"]
DAYS = {"Monday": 1, "Tuesday": 2, "Wednesday": 3, "Thursday": 4, "Friday": 5, "Saturday": 6, "Sunday": 0}
LEVELS = {"breaks its callers": "major", "learned a new option": "minor", "removes a field": "major"}
WORDS = ["pear", "fig", "apple", "plum", "kiwi", "melon", "lemon", "grape"]


def dates_iso() -> Pairs:
    for day, month, year in product(range(2, 29, 3), MONTHS, (2019, 2023, 2026)):
        yield f"Write the date {day} {month} {year}.", f"{year}-{_month(month):02}-{day:02}"


def dates_short() -> Pairs:
    for day, month, year in product(range(2, 29, 3), MONTHS, (2019, 2023, 2026)):
        yield f"Write the date {day} {month} {year}.", f"{month[:3]} {day}, '{year % 100}"


def dates_spoken() -> Pairs:
    for day, month, year in product(range(3, 29, 3), MONTHS, (2018, 2022, 2025)):
        yield f"Write the date {year}-{_month(month):02}-{day:02}.", f"On day {day} of {month}, in the year {year}."


def mood_plain() -> Pairs:
    for thing, text, city in product(THINGS, GOOD + BAD, CITIES[:4]):
        yield f"Review from {city}: the {thing} {text}.", f"mood={'good' if text in GOOD else 'bad'}; item={thing}"


def mood_stars() -> Pairs:
    for thing, text, city in product(THINGS, GOOD + BAD, CITIES[4:8]):
        yield f"Review from {city}: the {thing} {text}.", f"{'*****' if text in GOOD else '*'} [{thing.upper()}]"


def records() -> Pairs:
    for person, age, city in product(PEOPLE, range(21, 70, 8), CITIES[:5]):
        yield f"{person} is {age} and lives in {city}.", f'{{"name": "{person}", "age": {age}, "city": "{city}"}}'


def records_lines() -> Pairs:
    for person, age, city in product(PEOPLE, range(21, 70, 8), CITIES[:5]):
        yield f"{person} is {age} and lives in {city}.", f"{city.upper()}: {person} ({age})"


def alerts() -> Pairs:
    for host, (fault, action), level in product(HOSTS, FAULTS.items(), ("ERROR", "WARN", "INFO")):
        yield f"{level} {host}: {fault}", f"{action.upper()} on-call/{host.split('-')[0]} because {fault}"


def commits() -> Pairs:
    for area, (verb, kind), part in product(AREAS, CHANGES.items(), PARTS):
        yield f"{verb} {part} in the {area}.", f"{kind}({area}): {part}"


def cron() -> Pairs:
    for (day, number), hour, minute in product(DAYS.items(), range(1, 23, 4), (0, 5, 20, 45)):
        yield f"Run it every {day} at {hour}:{minute:02}.", f"{minute} {hour} * * {number}"


def sorting() -> Pairs:
    for first, second, third in product(WORDS, repeat=3):
        if len({first, second, third}) == 3:
            yield f"Sort: {first}, {second}, {third}", " < ".join(sorted((first, second, third)))


def orders() -> Pairs:
    for person, count, thing, price in product(PEOPLE, (2, 3, 5, 8), THINGS[:5], (15, 40, 120)):
        yield f"{person} ordered {count} times a {thing} at {price} euros.", f"{count} x {thing} = {count * price} EUR"


def travel() -> Pairs:
    for start, goal, (day, _), means in product(CITIES[:6], CITIES[4:], DAYS.items(), ("train", "bus")):
        if start != goal:
            yield f"On {day} I take the {means} from {start} to {goal}.", f"{day[:3]} {start} -> {goal} by {means}"


def bumps() -> Pairs:
    for area, major, minor, (word, part) in product(AREAS, range(1, 6), range(3), LEVELS.items()):
        numbers = {"major": f"{major + 1}.0", "minor": f"{major}.{minor + 1}"}
        yield f"Version {major}.{minor} of the {area} {word}.", f"release {area} {numbers[part]} ({part})"


def _month(name: str) -> int:
    return {month: number for number, month in enumerate([*MONTHS[:8], "September", *MONTHS[8:]], start=1)}[name]


SMALL: dict[str, Callable[[], Pairs]] = {
    "dates-iso": dates_iso,
    "dates-short": dates_short,
    "dates-spoken": dates_spoken,
    "mood-plain": mood_plain,
    "mood-stars": mood_stars,
    "records": records,
    "records-lines": records_lines,
    "alerts": alerts,
    "commits": commits,
    "cron": cron,
    "sorting": sorting,
    "orders": orders,
    "travel": travel,
    "bumps": bumps,
}
