"""The wording of the embedded data set: questions, answers and plain statements.

    from wording import TASKS
    slots = TASKS[0].sample(random.Random(0))       # {"word": "lamp", ...}
    TASKS[0].answer.format(**slots)

The same slots fill the questions (`instruction | input`), for fine-tuning, and the statements,
which show the same skill in plain text, for pre-training the base.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tasks import (
    add,
    add_large,
    compare,
    longest,
    membership,
    odd_one,
    opposite,
    opposite_zh,
    owners,
    record,
    sort_numbers,
    swap,
    word,
    word_list,
)


@dataclass
class Task:
    """One kind of question: how to draw it, and how to word it."""

    kind: str
    sample: Callable
    answer: str
    questions: list[str]
    statements: list[str]
    context: str = ""  # precedes the statements


TASKS = [
    Task(
        "copy",
        word,
        "{word}",
        ["Repeat the word: {word}", "Say this word again. | {word}", "Copy the input. | {word}"],
        ["{word}={word}", "{word} again: {word}."],
    ),
    Task(
        "uppercase",
        word,
        "{upper}",
        ["Write in capital letters: {word}", "Turn the word into upper case. | {word}"],
        ["{word}的大写是{upper}。", "upper case of {word}={upper}"],
    ),
    Task(
        "first_letter",
        word,
        "{first}",
        ["What is the first letter of {word}?", "Give the first letter of the word. | {word}"],
        ["{word} begins with {first}.", "first letter of {word}={first}"],
    ),
    Task(
        "last_letter",
        word,
        "{last}",
        ["What is the last letter of {word}?", "Give the last letter of the word. | {word}"],
        ["{word} ends with {last}.", "last letter of {word}={last}"],
    ),
    Task(
        "spell",
        word,
        "{letters}",
        ["Spell the word {word}.", "Write the letters of the word one by one. | {word}"],
        ["{word} is spelled {letters}.", "letters of {word}={letters}"],
    ),
    Task(
        "spell_backwards",
        word,
        "{backwards}",
        ["Spell the word {word} backwards.", "Write the letters from last to first. | {word}"],
        ["{word} backwards is {backwards}.", "backwards {word}={backwards}"],
    ),
    Task(
        "to_chinese",
        word,
        "{chinese}",
        ["Translate into Chinese: {word}", "{word}的中文是什么？", "翻译成中文。 | {word}"],
        ["{word} is {chinese} in Chinese.", "{word}的中文是{chinese}。"],
    ),
    Task(
        "to_english",
        word,
        "{word}",
        [
            "Translate into English: {chinese}",
            "{chinese}用英文怎么说？",
            "翻译成英文。 | {chinese}",
        ],
        ["{chinese} is {word} in English.", "{chinese}的英文是{word}。"],
    ),
    Task(
        "opposite",
        opposite,
        "{answer}",
        [
            "What is the opposite of {word}?",
            "Give the opposite of the word. | {word}",
            "Name the opposite: {word}",
        ],
        ["The opposite of {word} is {answer}.", "opposite of {word}={answer}"],
    ),
    Task(
        "opposite_zh",
        opposite_zh,
        "{answer}",
        ["{word}的反义词是什么？", "写出反义词。 | {word}", "请说出{word}的反义词。"],
        ["{word}的反义词是{answer}。", "反义词：{word}，{answer}。"],
    ),
    Task(
        "category",
        membership,
        "{own}",
        ["What kind of thing is this: {word}?", "Name the category of the word. | {word}"],
        ["A {word} is a kind of {own}.", "category of {word}={own}"],
    ),
    Task(
        "category_zh",
        membership,
        "{own_zh}",
        ["{chinese}属于哪一类？", "写出这个词的类别。 | {chinese}"],
        ["{chinese}属于{own_zh}。", "{chinese}的类别是{own_zh}。"],
    ),
    Task(
        "yes_no",
        membership,
        "{yes}",
        ["Is it a kind of {category}: {word}?", "Is the word a kind of {category}? | {word}"],
        ["A kind of {category}, {word}? {yes}", "{category}, {word}={yes}"],
    ),
    Task(
        "pick",
        odd_one,
        "{answer}",
        ["Which of these is a kind of {category}: {list}?", "Pick the {category}. | {list}"],
        ["Of {list}, the {category} is {answer}.", "{category} in {list}={answer}"],
    ),
    Task(
        "pick_zh",
        odd_one,
        "{answer_zh}",
        ["哪个是{category_zh}：{list_zh}？", "选出{category_zh}。 | {list_zh}"],
        [
            "在{list_zh}中，{category_zh}是{answer_zh}。",
            "{list_zh}里面的{category_zh}：{answer_zh}。",
        ],
    ),
    Task(
        "count",
        word_list,
        "{count}",
        ["How many words are in this list: {list}?", "Count the words. | {list}"],
        ["{list}: there are {count} words.", "number of {list}={count}"],
    ),
    Task(
        "reverse",
        word_list,
        "{backwards}",
        ["Reverse this list: {list}", "Write the list from last to first. | {list}"],
        ["{list} from last to first: {backwards}", "reverse of {list}={backwards}"],
    ),
    Task(
        "reverse_zh",
        word_list,
        "{backwards_zh}",
        ["把顺序倒过来：{list_zh}", "倒着写出来。 | {list_zh}"],
        ["{list_zh}倒过来是{backwards_zh}。", "倒着写{list_zh}，{backwards_zh}。"],
    ),
    Task(
        "last_word_zh",
        word_list,
        "{last_zh}",
        ["最后一个词是什么：{list_zh}？", "写出最后一个词。 | {list_zh}"],
        ["{list_zh}的最后一个词是{last_zh}。", "最后一个词：{list_zh}，{last_zh}。"],
    ),
    Task(
        "longest",
        longest,
        "{answer}",
        ["Which word is the longest: {list}?", "Pick the longest word. | {list}"],
        ["Of {list}, the longest word is {answer}.", "longest of {list}={answer}"],
    ),
    Task(
        "add",
        add,
        "{total}",
        [
            "What is {left} + {right}?",
            "Add {left} and {right}.",
            "Add the numbers. | {left} + {right}",
        ],
        ["{left} plus {right} is {total}.", "{left} + {right}={total}"],
    ),
    Task(
        "add_zh",
        add,
        "{total}",
        ["{left}加{right}等于多少？", "求两个数的和。 | {left}和{right}"],
        ["{left}加{right}等于{total}。", "{left}和{right}的和是{total}。"],
    ),
    Task(
        "add_large",
        add_large,
        "{total}",
        [
            "What is {left} + {right}?",
            "Add {left} and {right}.",
            "Add the numbers. | {left} + {right}",
        ],
        ["{left} plus {right} is {total}.", "{left} + {right}={total}"],
    ),
    Task(
        "larger",
        compare,
        "{larger}",
        ["Of {left} and {right}, which is larger?", "Give the larger number. | {left} and {right}"],
        ["Of {left} and {right}, {larger} is larger.", "larger of {left} and {right}={larger}"],
    ),
    Task(
        "smaller_zh",
        compare,
        "{smaller}",
        ["{left}和{right}，更小的是哪个？", "写出更小的数。 | {left}、{right}"],
        ["{left}和{right}，更小的是{smaller}。", "更小的数：{left}、{right}，{smaller}。"],
    ),
    Task(
        "sort",
        sort_numbers,
        "{rising}",
        ["Sort from small to large: {list}", "Sort the numbers, smallest first. | {list}"],
        ["{list} from small to large: {rising}", "{list} sorted={rising}"],
    ),
    Task(
        "color_of",
        owners,
        "{color}",
        ["What color is the {thing}? | {text}", "{text} What is the color of the {thing}?"],
        [
            "The {thing} is {color}.",
            "color of the {thing}={color}",
            "The {other_thing} is {other_color}.",
            "color of the {other_thing}={other_color}",
        ],
        context="{text}",
    ),
    Task(
        "owner",
        owners,
        "{who}",
        ["Who has the {thing}? | {text}", "{text} Who has something {color}?"],
        [
            "The one with the {thing} is {who}.",
            "owner of something {color}={who}",
            "The one with the {other_thing} is {other_who}.",
            "owner of something {other_color}={other_who}",
        ],
        context="{text}",
    ),
    Task(
        "owner_zh",
        owners,
        "{who_zh}",
        ["谁有{thing_zh}？ | {text_zh}", "{text_zh}{color_zh}的东西是谁的？"],
        [
            "有{thing_zh}的是{who_zh}。",
            "{color_zh}的东西是{who_zh}的。",
            "有{other_thing_zh}的是{other_who_zh}。",
            "{other_color_zh}的东西是{other_who_zh}的。",
        ],
        context="{text_zh}",
    ),
    Task(
        "replace",
        swap,
        "{changed}",
        ["Replace {old} with {new}. | {text}", "Change {old} to {new}: {text}"],
        ["{new} for {old}: {changed}", "{new} for {old}={changed}"],
        context="{text}",
    ),
    Task(
        "replace_zh",
        swap,
        "{changed_zh}",
        ["把{old_zh}换成{new_zh}。 | {text_zh}", "把下面的{old_zh}改成{new_zh}：{text_zh}"],
        ["{old_zh}换成{new_zh}：{changed_zh}"],
        context="{text_zh}",
    ),
    Task(
        "json",
        record,
        "{json}",
        [
            "Write it as JSON with name, age and city. | {text}",
            "Turn this into a JSON record: {text}",
        ],
        ["As JSON: {json}", "record={json}"],
        context="{text}",
    ),
    Task(
        "json_zh",
        record,
        "{json_zh}",
        ["写成JSON，包括姓名、年龄和城市。 | {text_zh}", "转换成JSON：{text_zh}"],
        ["写成JSON：{json_zh}"],
        context="{text_zh}",
    ),
]
