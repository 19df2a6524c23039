"""Order messages and their JSON, drawn from word lists: the skill that `make real` teaches.

    train, held_out = draw_rows(300, seed=0), draw_rows(60, seed=0, held_out=True)

A message names a customer, a number of things, a city and perhaps a day. The answer has the same
five fields, always in the same form: digits for words, the thing in the singular, null for a
missing day. Held-out messages use other customers, things, cities and sentences than training
messages.
"""

import json
import random
from typing import Any

Row = dict[str, str]

INSTRUCTION = (
    "Turn the order into JSON with the keys customer, item, quantity, city, day. "
    "Answer with the JSON only."
)
# Each list is in two parts: for training, and for held-out messages.
CUSTOMERS = (
    "Maria Tom Aisha Kenji Olga Pedro Nina Samuel Fatima Liam Chloe Hugo Ingrid Ravi Zoe Marco "
    "Elena Yusuf Anna Victor Leila Oscar Mei Daniel".split(),
    "Greta Omar Julia Hiroshi Sofia Ahmed Bella Felix Lucia Dmitri".split(),
)
ITEMS = (
    "umbrella notebook lamp chair pencil blanket bicycle kettle candle mirror hammer pillow "
    "backpack ladder teapot helmet basket carpet keyboard bucket".split(),
    "guitar table towel clock ribbon camera jacket bottle shovel printer".split(),
)
ADJECTIVES = (
    "blue red green white small large wooden old cheap heavy".split(),
    "black yellow round tall soft".split(),
)
CITIES = (
    "Lisbon Berlin Nairobi Osaka Toronto Madrid Oslo Lima Cairo Vienna Boston Delhi Prague Seoul "
    "Dublin Athens Denver Warsaw Quito Perth".split(),
    "Rome Chicago Hanoi Geneva Bogota Sydney Helsinki Austin Milan Tunis".split(),
)
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
NUMBERS = "two three four five six seven eight nine ten eleven twelve".split()
GREETINGS = (
    [
        "Hi, this is {customer}.",
        "{customer} here.",
        "Good morning, my name is {customer}.",
        "Hello! {customer} speaking.",
    ],
    ["Dear team, I am {customer}.", "Hey, it's {customer} again."],
)
REQUESTS = (
    [
        "Please send {number} {items} to {city}{when}.",
        "I need {number} {items} in {city}{when}.",
        "Could you deliver {number} {items} to our shop in {city}{when}?",
        "We are out of {items}. Ship {number} of them to {city}{when}.",
        "I would like {number} {items}{when}, to be sent to {city}.",
        "Our office in {city} ordered {items} last year. We want {number} more{when}.",
    ],
    [
        "Can we get {number} {items} for the house in {city}{when}?",
        "My friend in {city} wants {items}. Make it {number}{when}.",
        "I am looking for {number} {items}. They have to be in {city}{when}.",
    ],
)
WHEN = ([" by {day}", " on {day}", " before {day}"], [" no later than {day}", " this {day}"])
CLOSINGS = (
    ["Thanks!", "Call me if there is a problem.", "The last ones were great.", ""],
    ["Best wishes!", "I will pay in cash.", ""],
)


def draw_row(random_state: random.Random, held_out: bool) -> Row:
    """One Alpaca row: the instruction, a message as input, its JSON as output."""
    choose = random_state.choice
    part = int(held_out)
    adjective, item = choose(["", *ADJECTIVES[part]]), choose(ITEMS[part])
    item = f"{adjective} {item}".strip()
    quantity, day = random_state.randint(2, 12), choose([None, *DAYS])
    order: dict[str, Any] = {
        "customer": choose(CUSTOMERS[part]),
        "item": item,
        "quantity": quantity,
        "city": choose(CITIES[part]),
        "day": day,
    }
    when = choose(WHEN[part]).format(day=day) if day else ""
    number = choose([str(quantity), NUMBERS[quantity - 2]])
    sentences = choose(GREETINGS[part]), choose(REQUESTS[part]), choose(CLOSINGS[part])
    message = " ".join(sentences).format(**order, number=number, items=f"{item}s", when=when)
    return {"instruction": INSTRUCTION, "input": message.strip(), "output": json.dumps(order)}


def draw_rows(count: int, seed: int, held_out: bool = False) -> list[Row]:
    """`count` different rows. The same seed gives the same rows."""
    random_state, rows = random.Random(seed), {}
    while len(rows) < count:
        row = draw_row(random_state, held_out)
        rows[row["input"]] = row
    return list(rows.values())


def is_right(answer: str, row: Row) -> bool:
    """True if an answer is JSON with exactly the fields and values of the row's output."""
    try:
        return json.loads(answer) == json.loads(row["output"])
    except ValueError:
        return False
