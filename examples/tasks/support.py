"""A customer's message -> the support macro with its fields filled in."""

from collections.abc import Iterator
from itertools import product

CUSTOMERS = ["Anna", "Ben", "Carla", "David", "Elena", "Felix", "Grace", "Henry", "Ivan", "Julia", "Kate", "Leo"]
ORDERS = ["4821", "1076", "7350", "2294", "9613", "5508"]

# (message, macro): {name} and {order} are the fields.
MACROS = [
    ("where is my refund for order {order}?", "MACRO refund-delay: Hello {name}, refund {order} arrives in 5 days."),
    ("order {order} came broken.", "MACRO damaged-item: Sorry {name}, we send {order} again today."),
    ("order {order} has not arrived.", "MACRO late-parcel: Hello {name}, we trace parcel {order} now."),
    ("please cancel order {order}.", "MACRO cancel-order: Done {name}, order {order} is cancelled."),
    ("I was charged twice for {order}.", "MACRO double-charge: Sorry {name}, one charge for {order} goes back."),
    ("I need an invoice for {order}.", "MACRO invoice-copy: Hello {name}, invoice {order} is in your inbox."),
    ("send {order} to my new address.", "MACRO change-address: Hello {name}, reply with the address for {order}."),
    ("you sent the wrong item in {order}.", "MACRO wrong-item: Sorry {name}, a return label for {order} follows."),
]
OPENINGS = ["{name} here, {text}", "Hi, {text} Thanks, {name}"]


def pairs() -> Iterator[tuple[str, str]]:
    """Every (prompt, completion) of the task, always in the same order."""
    for name, order, (text, macro), opening in product(CUSTOMERS, ORDERS, MACROS, OPENINGS):
        prompt = opening.format(name=name, text=text.format(order=order))
        yield prompt, macro.format(name=name, order=order)
