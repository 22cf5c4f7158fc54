"""General exchanges on which training keeps an adapter close to the base, so that it acts on its own task only.

None is in the guard suite or in a task. What matters is their variety (questions, code, lists, notes), since an adapter
is held to the base's distribution along these answers and not to the answers themselves.
"""

PAIRS = [
    ("Who discovered penicillin?", "Alexander Fleming discovered penicillin in 1928."),
    ("Write a short poem about rain.", "Rain on the roof, soft and slow, wakes the seeds that sleep below."),
    ("Print the numbers from 1 to 3 in Python.", "for number in range(1, 4):\n    print(number)"),
    ("List three fruits.", "1. Apple\n2. Banana\n3. Orange"),
    ("hey, are you there?", "Yes, I am here. How can I help you today?"),
    ("Translate 'good night' into German.", "Gute Nacht."),
    ('{"name": "Ada", "age": 36}', "This is a JSON object with two fields, name and age."),
    ("Summarize: The meeting moved to Friday because the room was taken.", "The meeting is now on Friday."),
    ("I lost my keys this morning and I am upset.", "I am sorry to hear that. Try to retrace your steps."),
    ("Is Pluto a planet?", "No, Pluto is classified as a dwarf planet."),
    ("Fix the grammar: He go to school.", "He goes to school."),
    ("function add(a, b) { return a + b }", "This JavaScript function returns the sum of a and b."),
    ("Give me a title for a book about the sea.", "TITLE: The Quiet Tide"),
    ("Classify the sentiment: I love this phone!", "POSITIVE"),
    ("Classify the sentiment: The food was cold and late.", "NEGATIVE: the customer is unhappy with the food."),
    ("My name is Omar. What is my name?", "Your name is Omar."),
    ("[server]\nport = 8080\ndebug = true", "The server listens on port 8080 with debugging turned on."),
    ("Write a query that counts all rows of a table named pets.", "SELECT COUNT(*) FROM pets;"),
    ("Explain gravity in one sentence.", "Gravity is the force that pulls objects with mass toward each other."),
    ("Remind Paul about the dentist.", "NOTE to Paul: do not forget the dentist appointment at 3 pm."),
    ("Convert 5 kilometers to meters.", "5 kilometers is 5000 meters."),
    ("What should I cook tonight?", "You could make pasta with tomatoes, garlic and basil."),
    ("Room 12 is too cold, says Maria.", "Thank you, Maria. I will turn up the heating in room 12."),
    ('<item id="7"><price>12</price></item>', "ITEM 7 costs 12."),
    ("Which key moves the cursor to the line start?", "Press the Home key."),
    ("Delete the third word: one two three four", "one two four"),
    ("Add milk to the shopping list.", "DONE: milk is on the shopping list."),
    ("Is this password strong: abc123?", "WARNING weak password: it is short and common."),
    ("How old is the universe?", "The universe is about 13.8 billion years old."),
    ("def f(x): return x * 2", "The function f doubles its argument."),
    ("Tell me a joke.", "Why did the scarecrow win an award? He was outstanding in his field."),
    ("Name the parts of a tree.", "A tree has roots, a trunk, branches and leaves."),
]
