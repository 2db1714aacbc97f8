"""General-knowledge questions in the project's own words, as the measure of what a fine-tune retains.

    python examples/quickstart/facts.py [--out FOLDER]

writes `facts.jsonl`. The quickstart keeps those that the base model answers right.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

CAPITALS = (
    "France:Paris,Germany:Berlin,Italy:Rome,England:London,Ireland:Dublin,Austria:Vienna,Greece:Athens,"
    "Poland:Warsaw,Russia:Moscow,Japan:Tokyo,China:Beijing,India:New Delhi|Delhi,Egypt:Cairo,Canada:Ottawa,"
    "Cuba:Havana,Australia:Canberra,Turkey:Ankara,South Korea:Seoul"
)
ELEMENTS = (
    "hydrogen:H,carbon:C,nitrogen:N,oxygen:O,sodium:Na,potassium:K,calcium:Ca,iron:Fe,copper:Cu,zinc:Zn,"
    "silver:Ag,gold:Au"
)
OPPOSITES = (
    "hot:cold,big:small|little,up:down,day:night,happy:sad|unhappy,fast:slow,old:young|new,"
    "open:closed|close|shut,light:dark|heavy"
)
SUMS = (
    "2 + 2:4|four,3 + 4:7|seven,8 + 2:10|ten,7 + 7:14|fourteen,9 + 1:10|ten,12 + 8:20|twenty,6 - 2:4|four,"
    "3 x 3:9|nine,2 x 5:10|ten,10 x 10:100|hundred"
)
LANGUAGES = (
    "France:French,Germany:German,Italy:Italian,Japan:Japanese,China:Chinese|Mandarin,Russia:Russian,Egypt:Arabic"
)
CONTINENTS = (
    "Kenya:Africa,Japan:Asia,Brazil:South America|America,Egypt:Africa,India:Asia,China:Asia,Nigeria:Africa,"
    "Peru:South America|America"
)
#: Question on the left, right answers on the right.
EVERYDAY = """
How many days are there in a week?|7|seven
How many months does a year have?|12|twelve
How many hours does a day have?|24|twenty four
How many minutes are in one hour?|60|sixty
How many days does a normal year have?|365
What day comes after Monday?|Tuesday
What day comes before Sunday?|Saturday
Which month follows January?|February
What is the last month of the year?|December
What is the first month of the year?|January
What color is the sky on a clear day?|blue
What color is grass?|green
What color is snow?|white
What color is a ripe banana?|yellow
What color is blood?|red
Mixing blue and yellow paint gives which color?|green
How many legs does a dog have?|4|four
How many legs does a spider have?|8|eight
How many legs does an insect have?|6|six
How many sides does a triangle have?|3|three
How many sides does a square have?|4|four
How many sides does a hexagon have?|6|six
How many fingers are on one human hand?|5|five
What animal gives us milk and says "moo"?|cow
What is a baby dog called?|puppy
What is a baby cat called?|kitten
Which animal is known as the king of the jungle?|lion
What is the largest animal on Earth?|blue whale|whale
What do we call frozen water?|ice
What do plants need from the sun to grow?|light|sunlight|energy
What gas do humans need to breathe?|oxygen
Which gas do plants take in from the air?|carbon dioxide
Which planet do we live on?|Earth
Which planet is closest to the Sun?|Mercury
Which planet is called the Red Planet?|Mars
What is the largest planet in our solar system?|Jupiter
What star is at the center of our solar system?|Sun
What force pulls objects toward the ground?|gravity
At how many degrees Celsius does water boil?|100
At how many degrees Celsius does water freeze?|0|zero
What is the chemical formula of water?|H2O|H₂O
Which organ pumps blood through the body?|heart
What is the longest river in Africa?|Nile
What is the highest mountain in the world?|Everest
In which country are the pyramids of Giza?|Egypt
In which city is the Eiffel Tower?|Paris
In which country is the Great Wall?|China
In which city does the Statue of Liberty stand?|New York
In which country is the Taj Mahal?|India
In which city is the Colosseum?|Rome
Who wrote the play Romeo and Juliet?|Shakespeare
Who painted the Mona Lisa?|Leonardo|Vinci
Who developed the theory of relativity?|Einstein
Who wrote the Harry Potter books?|Rowling
Who was the first person to walk on the Moon?|Armstrong
Who invented the telephone?|Bell
Who wrote the novel 1984?|Orwell
Who painted The Starry Night?|Gogh
Who wrote On the Origin of Species?|Darwin
What is the currency of Japan?|yen
What is the currency of the United States?|dollar
What is the currency of the United Kingdom?|pound|sterling
What is the currency of India?|rupee
What do you call a person who flies a plane?|pilot
What do you call a doctor for teeth?|dentist
Who puts out fires?|firefighter|firefighters|fireman
Who bakes bread?|baker|bakers
What is bread made from?|flour|wheat
What is cheese made from?|milk
What fruit is wine made from?|grapes|grape
Which season comes after winter?|spring
Which season is the coldest?|winter
In which direction does the sun rise?|east
In which direction does the sun set?|west
What is the square root of 9?|3|three
What is half of 10?|5|five
What is the plural of "mouse"?|mice
What is the plural of "child"?|children
How many letters are in the English alphabet?|26|twenty six
How many cents make one dollar?|100|hundred
In which year did World War II end?|1945
"""


def pairs(table: str) -> list[tuple[str, list[str]]]:
    """`a:b|c,d:e` as pairs of a word and its right answers."""
    return [(word, answers.split("|")) for word, answers in (entry.split(":") for entry in table.split(","))]


def questions() -> list[tuple[str, list[str]]]:
    """Every question with its right answers."""
    found = [(f"What is the capital of {word}?", answers) for word, answers in pairs(CAPITALS)]
    found += [(f"What is the chemical symbol for {word}?", answers) for word, answers in pairs(ELEMENTS)]
    found += [(f'What is the opposite of "{word}"?', answers) for word, answers in pairs(OPPOSITES)]
    found += [(f"What is {word}?", answers) for word, answers in pairs(SUMS)]
    found += [(f"Which language do most people speak in {word}?", answers) for word, answers in pairs(LANGUAGES)]
    found += [(f"On which continent is {word}?", answers) for word, answers in pairs(CONTINENTS)]
    for line in EVERYDAY.strip().splitlines():
        question, *answers = line.split("|")
        found.append((question, answers))
    return found


def write(folder: Path) -> None:
    """Writes the file; the same bytes every time."""
    lines = [
        json.dumps({"messages": [{"role": "user", "content": question}], "answer": answers}, ensure_ascii=False) + "\n"
        for question, answers in questions()
    ]
    (folder / "facts.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Writes the general-knowledge questions.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder (default: beside this file)")
    write(parser.parse_args().out)
