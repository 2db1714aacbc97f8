"""The public data sets of the built-in tasks, brought to the prompts of the paper's authors, their spelling included."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from imsm.evaluation.task import HubSource, TaskRecord

Row = Mapping[str, Any]

MRPC = (
    "Determine if the following two sentences are semantically equivalent and output yes or no.\n"
    "Sentence1: {sentence1}\nSentence2: {sentence2}\nOuput:"
)
COLA = " Given a sentence, judge the grammatical acceptability of the sentence with yes or no.\nSentence:{sentence}\nOutput:"
ROPES = (
    "Given an article and a corresponding question about the article, answer the question accurately based on the "
    "provided context in the articles.\nArticle: {background} {situation}\nQuestion:{question} \nAnswer:"
)
GSM8K = (
    "You are an expert in math.\nBelow is a math question.\nWrite a response that appropriately answers the question.\n"
    "Your final answer should be an integer at the end of your response, formatted as: The answer is {{answer}}.\n"
    "{question}"
)
TRIVIA = (
    "Please provide a concise answer to the following question using one or a few words.\nQuestion:{question}\nAnswer:"
)
MULTIRC = (
    "Please answer the question according to the contents just with yes or no.\n"
    "Question: {question} \nContent: {paragraph} \nAnswer:"
)
BANKING77 = "Name the intent of this bank customer's message.\nMessage: {text}\nIntent:"


def mrpc(row: Row) -> list[TaskRecord]:
    return [TaskRecord(MRPC.format(**row), (_yes_or_no(row["label"], yes="equivalent", no="not_equivalent"),))]


def cola(row: Row) -> list[TaskRecord]:
    return [TaskRecord(COLA.format(**row), (_yes_or_no(row["label"], yes="acceptable", no="unacceptable"),))]


def ropes(row: Row) -> list[TaskRecord]:
    return [TaskRecord(ROPES.format(**row), tuple(row["answers"]["text"]))]


def gsm8k(row: Row) -> list[TaskRecord]:
    """Without the calculator's marks, and with the result in a sentence."""
    steps, result = re.sub(r"<<.*?>>", "", row["answer"]).split("\n#### ")
    return [TaskRecord(GSM8K.format(**row), (f"{steps}\nThe answer is {result.strip()}.",))]


def webq(row: Row) -> list[TaskRecord]:
    return [TaskRecord(TRIVIA.format(question=" " + row["question"]), tuple(row["answers"]))]


def freebaseqa(row: Row) -> list[TaskRecord]:
    """The answers of all parses, each once."""
    return [TaskRecord(TRIVIA.format(question=row["RawQuestion"]), tuple(dict.fromkeys(_answer_names(row["Parses"]))))]


def multirc(row: Row) -> list[TaskRecord]:
    """A question whose right answer is yes or no; others of its rows, and other questions, give nothing."""
    answer = row["answer"].strip().rstrip(".").lower()
    if row["label"] != "True" or answer not in ("yes", "no"):
        return []
    return [TaskRecord(MULTIRC.format(question=row["question"].strip(), paragraph=row["paragraph"]), (answer,))]


def banking77(row: Row) -> list[TaskRecord]:
    return [TaskRecord(BANKING77.format(text=row["text"]), (row["label"].replace("_", " "),))]


def wiki(row: Row) -> list[TaskRecord]:
    """A paragraph; headings and empty lines give nothing."""
    text = row["text"].strip()
    return [TaskRecord(text)] if text and not text.startswith("=") else []


def _yes_or_no(name: str, yes: str, no: str) -> str:
    return {yes: "yes", no: "no"}[name]


def _answer_names(value: Any) -> list[str]:
    """All texts below the key `AnswersName`, however deep the lists; versions of `datasets` nest them in different ways."""
    if isinstance(value, Mapping):
        named = _texts(value["AnswersName"]) if "AnswersName" in value else []
        return named + [name for key, part in value.items() if key != "AnswersName" for name in _answer_names(part)]
    return [name for part in value for name in _answer_names(part)] if isinstance(value, list) else []


def _texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [text for part in value for text in _texts(part)]


#: The branch of files that the Hub itself makes of a data set that still has a loading script, which is never run.
CONVERTED = "refs/convert/parquet"

#: By task. The test split, or the validation split where the test's answers are not public.
HUB: dict[str, HubSource] = {
    "mrpc": HubSource("nyu-mll/glue", "mrpc", "test", mrpc),
    "cola": HubSource("nyu-mll/glue", "cola", "validation", cola),
    "ropes": HubSource("allenai/ropes", None, "validation", ropes),
    "gsm8k": HubSource("openai/gsm8k", "main", "test", gsm8k),
    "webq": HubSource("stanfordnlp/web_questions", None, "test", webq),
    "freebaseqa": HubSource("KelvinJiang/freebase_qa", None, "test", freebaseqa, CONVERTED),
    "multirc": HubSource("aps/super_glue", "multirc", "validation", multirc),
    "banking77": HubSource("PolyAI/banking77", None, "test", banking77, CONVERTED),
    "wiki": HubSource("Salesforce/wikitext", "wikitext-2-raw-v1", "test", wiki),
}
