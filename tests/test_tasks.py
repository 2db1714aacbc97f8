"""Tasks: the built-in ones, a user's own, and their records from files and the Hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from imsm.errors import InputError
from imsm.evaluation.metrics import METRICS
from imsm.evaluation.sources import load_records
from imsm.evaluation.task import Task, TaskRecord
from imsm.evaluation.tasks import TASK_GROUPS, TASKS, find_tasks, read_task

TRIVIA = "Please provide a concise answer to the following question using one or a few words.\nQuestion:"

Write = Callable[..., Path]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data root; whoever asks the Hub fails."""
    monkeypatch.delattr("datasets.load_dataset")
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


@pytest.fixture
def write(root: Path) -> Write:
    """Writes records (or lines of text) as JSON Lines into the data root; gives the root."""

    def run(file: str, *records: Any) -> Path:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), "utf-8")
        return root

    return run


def pair(output: Any, text: str = "question") -> dict[str, Any]:
    return {"input": text, "output": output}


# -- the built-in tasks ----------------------------------------------------------------------------------------------


def test_tasks_are_whole() -> None:
    for name, task in TASKS.items():
        assert task.name == name and task.hub is not None
        assert all(METRICS[metric].kind == task.kind for metric in task.metrics)
        assert (task.reference is None) == (task.kind != "answer")
    assert {task.title for task in TASKS.values()} >= {"MRPC", "CoLA", "Banking77", "Plain text"}
    assert len({task.title for task in TASKS.values()}) == len(TASKS)
    assert [name for name, task in TASKS.items() if task.kind == "answer"] == [
        *TASK_GROUPS["targets"],
        *TASK_GROUPS["retained"],
        "banking77",
    ]


def test_metrics_of_the_paper() -> None:
    expected = {
        "mrpc": ("accuracy", "f1"),
        "cola": ("matthews", "accuracy"),
        "ropes": ("exact_match", "token_f1"),
        "gsm8k": ("number",),
        "webq": ("contains",),
        "freebaseqa": ("contains",),
        "multirc": ("accuracy",),
        "banking77": ("exact_match",),
        "wiki": ("cross_entropy",),
    }
    kept = ("identical", "agreement", "divergence")
    expected |= {f"kept_{name}": kept for name in ("webq", "freebaseqa", "multirc", "cola", "gsm8k")}
    assert {name: task.metrics for name, task in TASKS.items()} == expected
    chances = {"mrpc": 0.5, "multirc": 0.5, "cola": 0.0, "banking77": 1 / 77}
    assert {name: task.chance for name, task in TASKS.items() if task.chance is not None} == chances


def test_find_tasks() -> None:
    assert [task.name for task in find_tasks(["banking77", "targets", "mrpc"])] == [
        "banking77",
        *TASK_GROUPS["targets"],
    ]
    assert [task.kind for task in find_tasks(["kept"])] == ["kept"] * 5


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("bank77", "; did you mean 'banking77'"),
        ("WEBQ", "; did you mean 'webq'"),
        ("target", "; did you mean 'targets'"),
    ],
)
def test_unknown_tasks(name: str, near: str) -> None:
    with pytest.raises(InputError) as caught:
        find_tasks(["cola", name])
    message = str(caught.value)
    assert (
        message.startswith(f"unknown task {name!r}; ")
        and message.endswith(f"{near}?")
        and all(known in message for known in TASKS)
    )
    assert ".yaml" in message and "retained" in message


def test_no_tasks() -> None:
    with pytest.raises(InputError, match="no task is given; built in are mrpc, cola"):
        find_tasks([])


# -- a user's own ----------------------------------------------------------------------------------------------------


@pytest.fixture
def yaml_file(tmp_path: Path) -> Callable[[str], Path]:
    def run(text: str) -> Path:
        path = tmp_path / "shop.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return run


def test_a_task_of_few_lines(yaml_file: Callable[[str], Path]) -> None:
    task = read_task(yaml_file("file: shop/test.jsonl\n"))
    assert task == Task("shop", "shop", "answer", "shop/test.jsonl", ("exact_match",))
    assert find_tasks([str(yaml_file("file: shop/test.jsonl\n"))]) == [task]


def test_a_task_with_all_its_keys(yaml_file: Callable[[str], Path]) -> None:
    task = read_task(
        yaml_file(
            "name: opening\ntitle: Opening hours\nkind: answer\nfile: shop.parquet\nprompt: 'Q: {question}'\n"
            "reference: reply\nmetrics: [contains, token_f1]\nmax_new_tokens: 5\nchance: 0.25\nchat: auto\nlimit: 7\n"
        )
    )
    assert task == Task(
        name="opening",
        title="Opening hours",
        kind="answer",
        file="shop.parquet",
        metrics=("contains", "token_f1"),
        prompt="Q: {question}",
        reference="reply",
        max_new_tokens=5,
        chance=0.25,
        chat="auto",
        limit=7,
    )


def test_a_task_of_conversations(yaml_file: Callable[[str], Path], write: Write) -> None:
    question, answer = {"role": "user", "content": "Open?"}, {"role": "assistant", "content": "Yes."}
    path = yaml_file("file: chats.jsonl\nmessages: messages\nreference: key\nmetrics: contains_all\n")
    task = read_task(path)
    assert (task.messages, task.reference, task.metrics) == ("messages", "key", ("contains_all",))
    more = {"role": "user", "content": "On Sunday?"}
    data = write("chats.jsonl", {"messages": [question, answer, more, answer], "key": ["yes"]})
    turns = (("user", "Open?"), ("assistant", "Yes."), ("user", "On Sunday?"))
    (record,) = load_records(task, data, None, 0)
    assert record == TaskRecord("user: Open?\nassistant: Yes.\nuser: On Sunday?", ("yes",), turns)
    # A question alone is asked as it is, and its text stands for it.
    data = write("chats.jsonl", {"messages": [question], "key": "yes"})
    assert load_records(task, data, None, 0) == [TaskRecord("Open?", ("yes",), turns[:1])]
    for messages, message in (
        ([answer], "'messages' must end in a user's turn"),
        ([{"role": "bot", "content": "x"}], "line 1: 'messages\\[0\\].role' must be one of"),
        ("hello", "'messages' must be a list of messages, got a text"),
    ):
        data = write("chats.jsonl", {"messages": messages, "key": "yes"})
        with pytest.raises(InputError, match=message):
            load_records(task, data, None, 0)
    with pytest.raises(InputError, match="chat has no place beside it"):
        read_task(yaml_file("file: chats.jsonl\nmessages: messages\nchat: true\n"))
    with pytest.raises(InputError, match="plain texts, which are no conversations"):
        read_task(yaml_file("file: chats.jsonl\nkind: text\nmessages: messages\n"))


def test_tasks_without_references(yaml_file: Callable[[str], Path]) -> None:
    text = read_task(yaml_file("file: laws.jsonl\nkind: text\n"))
    assert (text.metrics, text.prompt, text.reference) == (("cross_entropy",), "{text}", None)
    kept = read_task(yaml_file("file: questions.jsonl\nkind: kept\nmetrics: agreement\n"))
    assert (kept.metrics, kept.reference, kept.max_new_tokens) == (("agreement",), None, 16)


def test_the_file_is_found_beside_the_yaml_first(yaml_file: Callable[[str], Path], write: Write) -> None:
    path = yaml_file("file: own/test.jsonl\nprompt: '{question}?'\nreference: reply\n")
    data = write("own/test.jsonl", {"question": "from the root", "reply": "yes"})
    assert load_records(read_task(path), data, None, 0) == [TaskRecord("from the root?", ("yes",))]
    with pytest.raises(
        InputError,
        match="'shop' has no public data set, and no own/test.jsonl beside its .yaml file; put it there, or give a",
    ):
        load_records(read_task(path), None, None, 0)
    beside = path.parent / "own" / "test.jsonl"
    beside.parent.mkdir()
    beside.write_text('{"question": "from beside", "reply": 3}\n', "utf-8")
    for given in (data, None, Path("no such folder")):
        assert load_records(read_task(path), given, None, 0) == [TaskRecord("from beside?", ("3",))]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file: a.jsonl\nmetric: f1", "unknown key 'metric'; known are name, title.*; did you mean 'metrics'.$"),
        ("file: a.jsonl\nhub: x", "unknown key 'hub'"),
        (
            "file: a.jsonl\nmetrics: exact",
            "unknown metric 'exact'; those of a task of kind answer are .*; did you mean 'exact_match'.$",
        ),
        ("file: a.jsonl\nmetrics: [f1, identical]", "metric identical is for tasks of kind kept, not answer; those of"),
        ("file: a.jsonl\nmetrics: []", r"metrics must be a metric's name or a list of names, got \[\]"),
        ("file: a.jsonl\nmetrics: [1]", r"metrics must be a metric's name or a list of names, got \[1\]"),
        ("file: a.jsonl\nkind: texts", "kind must be one of answer, text, kept; got 'texts'; did you mean 'text'.$"),
        ("name: x", "the key file is missing; it names the task's .jsonl, .json or .parquet file"),
        ("file: a.csv", "file must be a .jsonl, .json, .parquet file, got 'a.csv'"),
        ("file: a.jsonl\nname: 3", "name must be a text that is not empty, got 3"),
        ("file: a.jsonl\nmax_new_tokens: 0", "max_new_tokens must be a positive integer, got 0"),
        ("file: a.jsonl\nmax_new_tokens: true", "max_new_tokens must be a positive integer, got True"),
        ("file: a.jsonl\nchance: 1", "chance must be a number from 0 to below 1, or null, got 1"),
        ("file: a.jsonl\nchat: 1", "chat must be true, false or auto, got 1"),
        ("file: a.jsonl\nlimit: 0", "limit must be a positive integer, got 0"),
        ("file: a.jsonl\nkind: kept\nreference: output", "a task of kind kept has no reference; leave it out"),
        ("file: a.jsonl\nprompt: hello", "must name a field of the records in braces, such as {input}"),
        ("file: a.jsonl\nprompt: 'a { b'", "the prompt 'a { b' is wrong: .*; write {{ and }} for braces as such"),
        ("file: a.jsonl\nprompt: '{a.b}'", "must have the bare name of a field in each pair of braces"),
        ("file: a.jsonl\nprompt: '{a!r}'", "must have the bare name of a field"),
        ("- file", "must hold a task as 'key: value'"),
        ("", "must hold a task as 'key: value'"),
        ("file: [", "line [12] is not YAML"),
    ],
)
def test_wrong_task_files(yaml_file: Callable[[str], Path], text: str, message: str) -> None:
    path = yaml_file(text + "\n")
    with pytest.raises(InputError, match=message) as caught:
        read_task(path)
    assert str(path) in str(caught.value)


def test_numbers_with_an_exponent(yaml_file: Callable[[str], Path]) -> None:
    assert read_task(yaml_file("file: a.jsonl\nchance: 1e-2")).chance == 0.01


def test_task_files_that_are_none(tmp_path: Path, yaml_file: Callable[[str], Path]) -> None:
    with pytest.raises(InputError, match="there is no task file .*none.yml"):
        find_tasks([str(tmp_path / "none.yml")])
    with pytest.raises(InputError, match="two different tasks are named 'cola'"):
        find_tasks(["cola", str(yaml_file("name: cola\nfile: a.jsonl\n"))])


# -- records from files ----------------------------------------------------------------------------------------------


def test_records_of_a_file(write: Write) -> None:
    data = write("webq/test.jsonl", pair(["Tony Warren", "T. {W}"], "who?\nAnswer:"), pair("Yaotsu", " {what}?"))
    expected = [TaskRecord("who?\nAnswer:", ("Tony Warren", "T. {W}")), TaskRecord(" {what}?", ("Yaotsu",))]
    assert load_records(TASKS["webq"], data, None, 0) == expected
    assert load_records(TASKS["kept_webq"], data, None, 0) == [TaskRecord(one.prompt) for one in expected]


def test_plain_text_needs_no_reference(write: Write) -> None:
    data = write("wiki/sentences.jsonl", {"text": "one sentence"}, {"text": "two"})
    assert load_records(TASKS["wiki"], data, None, 0) == [TaskRecord("one sentence"), TaskRecord("two")]


def test_other_formats(root: Path) -> None:
    (root / "cola").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([pair("no")]), root / "cola" / "test.parquet")
    assert load_records(TASKS["cola"], root, None, 0) == [TaskRecord("question", ("no",))]
    (root / "cola" / "test.json").write_text(json.dumps([pair("yes")]), "utf-8")
    assert load_records(TASKS["cola"], root, None, 0) == [TaskRecord("question", ("yes",))]


def test_a_limit_takes_the_same_records_for_everybody(write: Write) -> None:
    data = write("webq/test.jsonl", *(pair("x", str(number)) for number in range(100)))
    some = [int(one.prompt) for one in load_records(TASKS["webq"], data, 10, 3)]
    assert len(set(some)) == 10 and some == sorted(some) and some != list(range(10))
    assert some == [int(one.prompt) for one in load_records(TASKS["kept_webq"], data, 10, 3)]
    assert some != [int(one.prompt) for one in load_records(TASKS["webq"], data, 10, 4)]
    # Written down, so that results stay comparable from one version to the next.
    assert some == [8, 16, 30, 47, 60, 69, 74, 75, 77, 80]
    assert len(load_records(TASKS["webq"], data, 1000, 3)) == 100
    # A task's own limit holds beside the run's, whichever is less.
    own = replace(TASKS["webq"], limit=10)
    for limit in (None, 50):
        assert [int(one.prompt) for one in load_records(own, data, limit, 3)] == some
    assert len(load_records(own, data, 5, 3)) == 5
    with pytest.raises(InputError, match="the limit of task 'webq' must be positive, got 0"):
        replace(own, limit=0)
    with pytest.raises(InputError, match="the limit of records must be positive, got 0"):
        load_records(TASKS["webq"], data, 0, 3)


@pytest.mark.parametrize(
    ("task", "records", "message"),
    [
        ("mrpc", [pair("yes"), {"text": "x"}], "line 2: there is no field 'input'; the record's fields are 'text'"),
        (
            "mrpc",
            [{"input": "x", "label": 1}],
            "line 1: there is no field 'output'; the record's fields are 'input', 'l",
        ),
        ("webq", [{"input": None, "output": "x"}], "'input' must be a text or a number to stand in a prompt, got null"),
        ("webq", [pair("x", " \n")], "line 1: the prompt is empty"),
        ("webq", [pair({"a": 1})], "'output' must be a text, a number or a list of them, got an object"),
        ("webq", [pair(["x", True])], "must be a text, a number or a list of them, got a list with true or false"),
        ("webq", [pair([])], "line 1: 'output' is an empty list; at least one answer must count"),
        ("webq", [pair(["x", " "])], "the metric contains needs a text that is not empty as reference, got ' '"),
        ("mrpc", [pair("equivalent")], "the metric accuracy needs yes or no as reference, got 'equivalent'"),
        ("gsm8k", [pair("twelve")], "the metric number needs a text with a number as reference, got 'twelve'"),
        ("webq", [pair("x"), "{", "[]"], r"line 2: not JSON: .*, and 1 more; correct it"),
        ("webq", [], "has no records; task 'webq' needs at least one"),
        ("wiki", [{"sentence": "x"}], "line 1: there is no field 'text'; the record's fields are 'sentence'"),
    ],
)
def test_wrong_records(write: Write, task: str, records: list[Any], message: str) -> None:
    data = write(TASKS[task].file, *records)
    with pytest.raises(InputError, match=message) as caught:
        load_records(TASKS[task], data, None, 0)
    assert str(data / TASKS[task].file) in str(caught.value)


def test_missing_data(root: Path) -> None:
    with pytest.raises(InputError, match="there is no folder .*nowhere; the data root of task 'mrpc' must hold mrpc/t"):
        load_records(TASKS["mrpc"], root / "nowhere", None, 0)
    with pytest.raises(
        InputError, match="there is no file .*mrpc/test.jsonl, which task 'mrpc' needs; give another data "
    ):
        load_records(TASKS["mrpc"], root, None, 0)
    # A file without a folder is a name that a data set of the Hub could have.
    with pytest.raises(InputError, match="there is no file .*mrpc.jsonl"):
        load_records(replace(TASKS["mrpc"], file="mrpc.jsonl"), root, None, 0)


# -- records from the Hub --------------------------------------------------------------------------------------------

TEXT = datasets.Value("string")
ANSWERS = datasets.List({"AnswersMid": TEXT, "AnswersName": datasets.List(TEXT)})
INTENTS = ["activate_my_card", "reverted_card_payment?", "Refund_not_showing_up"]

#: By task: the columns as the data set declares them, its rows, and the records that the local files would have.
HUB: dict[str, tuple[dict[str, Any], list[dict[str, Any]], list[TaskRecord]]] = {
    "mrpc": (
        {"sentence1": TEXT, "sentence2": TEXT, "label": datasets.ClassLabel(names=["not_equivalent", "equivalent"])},
        [
            {"sentence1": "It {rained} .", "sentence2": "Rain fell .", "label": 1},
            {"sentence1": "It rained .", "sentence2": "It snowed .", "label": 0},
        ],
        [
            TaskRecord(
                "Determine if the following two sentences are semantically equivalent and output yes or no.\n"
                f"Sentence1: {one}\nSentence2: {two}\nOuput:",
                (answer,),
            )
            for one, two, answer in [("It {rained} .", "Rain fell .", "yes"), ("It rained .", "It snowed .", "no")]
        ],
    ),
    "cola": (
        {"sentence": TEXT, "label": datasets.ClassLabel(names=["unacceptable", "acceptable"])},
        [{"sentence": "Birds sing.", "label": 1}, {"sentence": "Birds sings.", "label": 0}],
        [
            TaskRecord(
                " Given a sentence, judge the grammatical acceptability of the sentence with yes or no.\n"
                f"Sentence:{sentence}\nOutput:",
                (answer,),
            )
            for sentence, answer in [("Birds sing.", "yes"), ("Birds sings.", "no")]
        ],
    ),
    "ropes": (
        {"background": TEXT, "situation": TEXT, "question": TEXT, "answers": {"text": datasets.List(TEXT)}},
        [
            {
                "background": "Salt melts ice.",
                "situation": "Ann salts her yard.",
                "question": "Whose yard has less ice?",
                "answers": {"text": ["Ann"]},
            }
        ],
        [
            TaskRecord(
                "Given an article and a corresponding question about the article, answer the question accurately based "
                "on the provided context in the articles.\nArticle: Salt melts ice. Ann salts her yard.\n"
                "Question:Whose yard has less ice? \nAnswer:",
                ("Ann",),
            )
        ],
    ),
    "gsm8k": (
        {"question": TEXT, "answer": TEXT},
        [
            {
                "question": "Ann has 2 sets of 3 pens. How many?",
                "answer": "She has 2*3=<<2*3=6>>6 pens.\nIn all <<6=6>>6.\n#### 1,006",
            }
        ],
        [
            TaskRecord(
                "You are an expert in math.\nBelow is a math question.\nWrite a response that appropriately answers the "
                "question.\nYour final answer should be an integer at the end of your response, formatted as: The answer "
                "is {answer}.\nAnn has 2 sets of 3 pens. How many?",
                ("She has 2*3=6 pens.\nIn all 6.\nThe answer is 1,006.",),
            )
        ],
    ),
    "webq": (
        {"url": TEXT, "question": TEXT, "answers": datasets.List(TEXT)},
        [{"url": "", "question": "who wrote it?", "answers": ["Ann", "Bo"]}],
        [TaskRecord(TRIVIA + " who wrote it?\nAnswer:", ("Ann", "Bo"))],
    ),
    "freebaseqa": (
        {"RawQuestion": TEXT, "Parses": datasets.List({"Parse-Id": TEXT, "Answers": ANSWERS})},
        [
            {
                "RawQuestion": "Who sang it?",
                "Parses": [
                    {"Parse-Id": "0", "Answers": [{"AnswersMid": "m.1", "AnswersName": ["abba"]}]},
                    {"Parse-Id": "1", "Answers": [{"AnswersMid": "m.1", "AnswersName": ["abba", "agnetha"]}]},
                ],
            }
        ],
        [TaskRecord(TRIVIA + "Who sang it?\nAnswer:", ("abba", "agnetha"))],
    ),
    "multirc": (
        {
            "paragraph": TEXT,
            "question": TEXT,
            "answer": TEXT,
            "label": datasets.ClassLabel(names=["False", "True"]),
        },
        [
            {"paragraph": "Ann left.", "question": "Did Ann stay?", "answer": "Yes", "label": 0},
            {"paragraph": "Ann left.", "question": "Did Ann stay?", "answer": "No.", "label": 1},
            {"paragraph": "Ann left.", "question": "Who left?", "answer": "Ann", "label": 1},
        ],
        [
            TaskRecord(
                "Please answer the question according to the contents just with yes or no.\n"
                "Question: Did Ann stay? \nContent: Ann left. \nAnswer:",
                ("no",),
            )
        ],
    ),
    "banking77": (
        {"text": TEXT, "label": datasets.ClassLabel(names=INTENTS)},
        [{"text": "It was undone!", "label": 1}, {"text": "Where is my refund?", "label": 2}],
        [
            TaskRecord(f"Name the intent of this bank customer's message.\nMessage: {text}\nIntent:", (intent,))
            for text, intent in [
                ("It was undone!", "reverted card payment?"),
                ("Where is my refund?", "Refund not showing up"),
            ]
        ],
    ),
    "wiki": (
        {"text": TEXT},
        [{"text": " = Heading = \n"}, {"text": ""}, {"text": " Robert is an actor . \n"}],
        [TaskRecord("Robert is an actor .")],
    ),
}


@pytest.mark.parametrize("name", HUB)
def test_the_hub_gives_the_prompts_of_the_files(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    columns, rows, expected = HUB[name]
    asked: list[Any] = []

    def load_dataset(*arguments: Any, **more: Any) -> datasets.Dataset:
        asked.append((*arguments, more))
        return datasets.Dataset.from_list(rows, features=datasets.Features(columns))

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    hub = TASKS[name].hub
    assert hub is not None
    assert load_records(TASKS[name], None, None, 0) == expected
    assert asked == [(hub.name, hub.config, {"split": hub.split, "revision": hub.revision})]


def test_every_built_in_set_is_tested() -> None:
    assert set(HUB) == {name for name in TASKS if not name.startswith("kept_")}


def test_nested_lists_of_answers() -> None:
    """As older files of the Hub have them: a mapping of lists instead of a list of mappings."""
    parses = {"Parse-Id": ["0"], "Answers": [{"AnswersMid": ["m.1", "m.2"], "AnswersName": [["abba"], ["agnetha"]]}]}
    hub = TASKS["freebaseqa"].hub
    assert hub is not None
    (record,) = hub.convert({"RawQuestion": "Who?", "Parses": parses})
    assert record.references == ("abba", "agnetha")


def test_kept_tasks_take_the_prompts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    columns, rows, expected = HUB["webq"]
    monkeypatch.setattr(
        "datasets.load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows, datasets.Features(columns))
    )
    assert load_records(TASKS["kept_webq"], None, None, 0) == [TaskRecord(expected[0].prompt)]


def test_what_the_hub_does_not_give(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr("datasets.load_dataset", offline)
    remedy = "give a folder that holds cola/test.jsonl with --data-root"
    with pytest.raises(InputError, match=rf"nyu-mll/glue cannot be loaded from the Hub \(no network\); {remedy}"):
        load_records(TASKS["cola"], None, None, 0)
    with pytest.raises(InputError, match=f"task 'cola' has no public data set, and no cola/test.jsonl .*, or {remedy}"):
        load_records(replace(TASKS["cola"], hub=None), None, None, 0)


@pytest.mark.parametrize(
    ("columns", "rows", "message"),
    [
        ({"text": TEXT}, [{"text": "x"}], "nyu-mll/glue validation row 1 is not as expected"),
        (HUB["cola"][0], [{"sentence": "x", "label": -1}], "row 1 is not as expected"),
        (HUB["cola"][0], [], "the validation split of nyu-mll/glue has no records for task 'cola'"),
    ],
)
def test_rows_that_are_not_as_expected(
    monkeypatch: pytest.MonkeyPatch, columns: dict[str, Any], rows: list[dict[str, Any]], message: str
) -> None:
    monkeypatch.setattr(
        "datasets.load_dataset",
        lambda *_, **__: datasets.Dataset.from_dict(
            {key: [row[key] for row in rows] for key in columns}, datasets.Features(columns)
        ),
    )
    with pytest.raises(InputError, match=message):
        load_records(TASKS["cola"], None, None, 0)
