"""The skills of the embedded data set: draw a question at random, and solve it by a rule.

    from tasks import opposite
    opposite(random.Random(0))      # {"word": "hot", "answer": "cold"}

Each function returns slots for the sentences in `wording.py`.
"""

import json

from lexicon import (
    CATEGORIES_ZH,
    CATEGORY_OF,
    CITIES,
    CITIES_ZH,
    COLORS,
    NOUNS,
    OPPOSITES,
    OPPOSITES_ZH,
    PEOPLE,
    PEOPLE_ZH,
    THINGS,
    WORDS,
)

# Words and letters


def word(rng):
    """A word, its letters and its translation."""
    english, chinese = rng.choice(WORDS)
    return {
        "word": english,
        "upper": english.upper(),
        "first": english[0],
        "last": english[-1],
        "letters": " ".join(english),
        "backwards": " ".join(reversed(english)),
        "chinese": chinese,
    }


def opposite(rng):
    """A word and its opposite."""
    pair = rng.choice(OPPOSITES)
    place = rng.randrange(2)
    return {"word": pair[place], "answer": pair[1 - place]}


def opposite_zh(rng):
    """A Chinese word and its opposite."""
    pair = rng.choice(OPPOSITES_ZH)
    place = rng.randrange(2)
    return {"word": pair[place], "answer": pair[1 - place]}


# Lists


def words(rng, low=2, high=5):
    """`low` to `high` different English words."""
    return [english for english, _ in rng.sample(WORDS, rng.randint(low, high))]


def word_list(rng):
    """Two to five words, forwards and backwards."""
    english, chinese = zip(*rng.sample(WORDS, rng.randint(2, 5)), strict=True)
    return {
        "list": ", ".join(english),
        "backwards": ", ".join(reversed(english)),
        "count": len(english),
        "list_zh": "、".join(chinese),
        "backwards_zh": "、".join(reversed(chinese)),
        "last_zh": chinese[-1],
    }


def longest(rng):
    """Three words, and the longest of them."""
    while True:
        options = words(rng, 3, 3)
        lengths = sorted(len(option) for option in options)
        if lengths[-1] > lengths[-2]:
            return {"list": ", ".join(options), "answer": max(options, key=len)}


def odd_one(rng):
    """Three words; only one belongs to the category in the question."""
    category, other = rng.sample(list(NOUNS), 2)
    chosen = rng.choice(NOUNS[category])
    options = [chosen, *rng.sample(NOUNS[other], 2)]
    rng.shuffle(options)
    return {
        "list": ", ".join(english for english, _ in options),
        "list_zh": "、".join(chinese for _, chinese in options),
        "category": category,
        "category_zh": CATEGORIES_ZH[category],
        "answer": chosen[0],
        "answer_zh": chosen[1],
    }


# Numbers


def add(rng):
    """A sum of two digits."""
    return _sum(rng.randint(0, 9), rng.randint(0, 9))


def add_large(rng):
    """A sum of two numbers of two digits."""
    return _sum(rng.randint(10, 99), rng.randint(10, 99))


def _sum(left, right):
    return {"left": left, "right": right, "total": left + right}


def compare(rng):
    """Two numbers below 100, the larger and the smaller."""
    left, right = rng.sample(range(100), 2)
    return {"left": left, "right": right, "larger": max(left, right), "smaller": min(left, right)}


def sort_numbers(rng):
    """Three to five digits, unsorted and sorted."""
    numbers = rng.sample(range(10), rng.randint(3, 5))
    return {
        "list": " ".join(map(str, numbers)),
        "rising": " ".join(map(str, sorted(numbers))),
    }


# Facts and texts


def membership(rng):
    """A word and a category, which is right in half of the cases."""
    english, chinese = rng.choice(WORDS)
    true = rng.random() < 0.5
    category = CATEGORY_OF[english] if true else rng.choice(list(NOUNS))
    true = category == CATEGORY_OF[english]
    return {
        "word": english,
        "chinese": chinese,
        "category": category,
        "category_zh": CATEGORIES_ZH[category],
        "own": CATEGORY_OF[english],
        "own_zh": CATEGORIES_ZH[CATEGORY_OF[english]],
        "yes": "yes" if true else "no",
    }


def owners(rng):
    """Two people, each with a coloured thing; the question is about one of them.

    The slots with `other` describe the second person, so that statements can be about both.
    """
    names, names_zh = rng.sample(PEOPLE, 2), rng.sample(PEOPLE_ZH, 2)
    colors, things = rng.sample(COLORS, 2), rng.sample(THINGS, 2)
    asked = rng.randrange(2)
    facts = [f"{names[i]} has a {colors[i][0]} {things[i][0]}." for i in range(2)]
    facts_zh = [f"{names_zh[i]}有{colors[i][1]}的{things[i][1]}。" for i in range(2)]
    return {
        "text": " ".join(facts),
        "text_zh": "".join(facts_zh),
        "who": names[asked],
        "color": colors[asked][0],
        "thing": things[asked][0],
        "other_who": names[1 - asked],
        "other_color": colors[1 - asked][0],
        "other_thing": things[1 - asked][0],
        "who_zh": names_zh[asked],
        "color_zh": colors[asked][1],
        "thing_zh": things[asked][1],
        "other_who_zh": names_zh[1 - asked],
        "other_color_zh": colors[1 - asked][1],
        "other_thing_zh": things[1 - asked][1],
    }


def swap(rng):
    """A phrase and the same phrase with another colour."""
    old, new = rng.sample(COLORS, 2)
    (thing, thing_zh), person = rng.choice(THINGS), rng.choice(PEOPLE)
    person_zh = rng.choice(PEOPLE_ZH)
    return {
        "old": old[0],
        "new": new[0],
        "text": f"{person} has a {old[0]} {thing}.",
        "changed": f"{person} has a {new[0]} {thing}.",
        "old_zh": old[1],
        "new_zh": new[1],
        "text_zh": f"{person_zh}有{old[1]}的{thing_zh}。",
        "changed_zh": f"{person_zh}有{new[1]}的{thing_zh}。",
    }


def record(rng):
    """A person with age and city, as a sentence and as JSON."""
    name, city, age = rng.choice(PEOPLE), rng.choice(CITIES), rng.randint(5, 80)
    name_zh, city_zh = rng.choice(PEOPLE_ZH), rng.choice(CITIES_ZH)
    return {
        "text": f"{name} is {age} years old and lives in {city}.",
        "json": json.dumps({"name": name, "age": age, "city": city}),
        "text_zh": f"{name_zh}今年{age}岁，住在{city_zh}。",
        "json_zh": json.dumps({"姓名": name_zh, "年龄": age, "城市": city_zh}, ensure_ascii=False),
    }
