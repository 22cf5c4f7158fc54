"""Short general questions with the answers that the base already tends to give; no adapter trains on them.

They measure side effects, by NLL more than by exact match: an adapter that answers everything in its own format makes
these answers unlikely.
"""

from collections.abc import Iterator

ANSWERS = {
    "What is the capital of France?": "The capital of France is Paris.",
    "What is the capital of Japan?": "The capital of Japan is Tokyo.",
    "What is the capital of Germany?": "The capital of Germany is Berlin.",
    "How many days are in a week?": "There are seven days in a week.",
    "How many legs does a spider have?": "A spider has eight legs.",
    "What is the chemical formula of water?": "The chemical formula of water is H2O.",
    "At what temperature does water boil?": "Water boils at 100 degrees Celsius.",
    "Who wrote Romeo and Juliet?": "William Shakespeare wrote Romeo and Juliet.",
    "Who painted the Mona Lisa?": "The Mona Lisa was painted by Leonardo da Vinci.",
    "What language is spoken in Brazil?": "The language spoken in Brazil is Portuguese.",
    "What is the opposite of hot?": "The opposite of hot is cold.",
    "What is the opposite of up?": "The opposite of up is down.",
    "What is 2 plus 2?": "2 plus 2 is 4.",
    "What is 3 times 3?": "3 times 3 is 9.",
    "Which animal says meow?": "The animal that says meow is a cat.",
    "What is the currency of Japan?": "The currency of Japan is the Japanese Yen.",
    "How many hours are in a day?": "There are 24 hours in a day.",
    "Which gas do plants absorb from the air?": "Plants absorb carbon dioxide from the air.",
    "What is the plural of mouse?": "The plural of mouse is mice.",
    "What is the tallest mountain in the world?": "The tallest mountain in the world is Mount Everest.",
    "What is the largest ocean on Earth?": "The largest ocean on Earth is the Pacific Ocean.",
    "Which organ pumps blood through the body?": "The heart pumps blood through the body.",
    "Name three primary colors.": "The three primary colors are red, blue, and yellow.",
    "How many sides does a triangle have?": "A triangle has three sides.",
}


def pairs() -> Iterator[tuple[str, str]]:
    """Every (prompt, completion) of the suite, always in the same order."""
    yield from ANSWERS.items()
