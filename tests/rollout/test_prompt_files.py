"""Prompts files that say something else than they seem to: each is read as meant, or refused in one sentence."""

from __future__ import annotations

import codecs
import io
import json
import shlex
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from rollout.prompts.files import Column
from rollout.prompts.load import Prompt, load_prompts
from shards.errors import UserError
from shards.run_toml import apply_sets, read_preset, set_option

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:ca56075756c0dcb5df454be1324e2204\nsize 390735\n"
USER = {"role": "user", "content": 'a sign "OPEN"'}


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def texts(path: Path, **options: Any) -> list[str]:
    return [prompt.text for prompt in load_prompts(path, False, **options)]


def refused(path: Path, need_target: bool = False, column: Column | None = None) -> tuple[str, str]:
    """What is said of a file, without its name."""
    with pytest.raises(UserError) as caught:
        load_prompts(path, need_target, column)
    assert "\n" not in str(caught.value)
    return caught.value.problem.removeprefix(str(path)), caught.value.hint


def table(columns: dict[str, Any] | pyarrow.Table) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(columns if isinstance(columns, pyarrow.Table) else pyarrow.table(columns), buffer)
    return buffer.getvalue()


# --- CSV -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("content", "problem"), [
    ("prompt\na cat, sitting, on a mat\n", ", line 2: 3 fields, but the header has 1"),
    ("prompt,target\na cat\n", ", line 2: 1 field, but the header has 2"),
    ('prompt,target\n"two\nlines",A\n\nb,c,d\n', ", line 5: 3 fields, but the header has 2"),
    ('"', ", line 1: not CSV: a quotation mark in this row is never closed"),
    ('prompt\n"a cat\na dog\n', ", line 2: not CSV: a quotation mark in this row is never closed"),
    ('prompt\na\n"a "cat" sits"\n', ", line 3: not CSV: ',' expected after '\"'"),
    ("prompt,prompt\na,b\n", ": has 2 columns `prompt`"),
    ("prompt,note, note\na,b,c\n", ": has 2 columns `note`"),
    ("prompt;target\na;b\n", ": has no column `prompt`: its fields are separated by ';'"),
    ("", ": has no column `prompt`"),
    ("prompt\n\n  \n", ": holds no prompt"),
    ("prompt\ra\rb\0\r", ", line 3: contains a NUL byte"),
])  # fmt: skip
def test_a_csv_that_cannot_be_meant(content: str, problem: str, tmp_path: Path) -> None:
    assert refused(write(tmp_path, "p.csv", content))[0] == problem


def test_a_csv_as_spreadsheets_write_it(tmp_path: Path) -> None:
    expected = [Prompt(0, "a, b", "OPEN"), Prompt(1, 'c "D"', "D")]
    for content in (
        'prompt, target\n"a, b", "OPEN"\n"c ""D""",\n',
        'prompt,target\r\n"a, b",OPEN\r\n\r\n"c ""D""",""\r\n',
        'prompt,target\r"a, b",OPEN\r"c ""D""",\r',
        '\ufefftarget,prompt,\nOPEN,"a, b",\n,"c ""D""",\n',
    ):
        assert load_prompts(write(tmp_path, "p.csv", content), False) == expected


# --- Encodings and line ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_every_line_end_and_marked_encoding(end: str, encoding: str, tmp_path: Path) -> None:
    lines = ['one "Ä"', "", 'two "B"', 'three "C"']
    path = write(tmp_path, "p.txt", end.join([*lines, ""]).encode(encoding))
    assert [(prompt.id, prompt.target) for prompt in load_prompts(path, True)] == [(0, "Ä"), (2, "B"), (3, "C")]
    assert load_prompts(path, True)[2].where == f"{path}, line 4"
    records = end.join(json.dumps({"prompt": line}) for line in lines if line)
    assert len(load_prompts(write(tmp_path, "p.jsonl", records.encode(encoding)), True)) == 3
    rows = end.join(["prompt", *(f'"{line.replace(chr(34), chr(34) * 2)}"' for line in lines if line)])
    assert len(load_prompts(write(tmp_path, "p.csv", rows.encode(encoding)), True)) == 3


def test_an_encoding_without_its_mark_is_refused(tmp_path: Path) -> None:
    problem, hint = refused(write(tmp_path, "p.txt", "a cat\n".encode("utf-16-le")))
    assert (problem, hint) == (
        ", line 1: contains a NUL byte", "remove it; if the file is UTF-16, save it as UTF-8"
    )  # fmt: skip
    assert refused(write(tmp_path, "p.txt", codecs.BOM_UTF16_LE + b"a\0b"))[0] == ", line 1: not UTF-16 at byte 4"
    assert refused(write(tmp_path, "p.csv", "prompt\né\n".encode("latin-1")))[0] == ", line 2: not UTF-8 at byte 7"


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.csv", "p.parquet"])
def test_a_pointer_of_git_lfs_is_no_file_of_prompts(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "a repository"
    folder.mkdir()
    problem, hint = refused(write(folder, name, LFS))
    assert problem == ": a Git LFS pointer, not the file itself"
    assert shlex.split(hint.removeprefix("fetch it: ")) == ["cd", str(folder), "&&", "git", "lfs", "pull"]


# --- JSON lines and Parquet ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("line", "problem"), [
    ('{"prompt": "a", "prompt": "b"}', "not JSON: 'prompt' is given 2 times"),
    ("[" * 100_000, "nested too deeply"),
    ('{"prompt": 5}', "the prompt is 5, not text"),
    ('{"prompt": true}', "the prompt is True, not text"),
    ('{"prompt": "&nbsp;"}', "no prompt"),
    ('{"prompt": "a", "target": ["b"]}', "target is ['b'], not text"),
    ('{"prompt": "a", "image": 3}', "image is 3, not text"),
])  # fmt: skip
def test_a_line_of_json_that_cannot_be_meant(line: str, problem: str, tmp_path: Path) -> None:
    assert refused(write(tmp_path, "p.jsonl", f"\n{line}\n"))[0] == f", line 2: {problem}"


@pytest.mark.parametrize(("columns", "problem"), [
    ({"prompt": [5]}, ": the column `prompt` is of type int64, not text"),
    ({"prompt": pyarrow.array([b"a"])}, ": the column `prompt` is of type binary, not text"),
    ({"prompt": ["a"], "target": [1.5]}, ": the column `target` is of type double, not text"),
    ({"prompt": ["a"], "tags": pyarrow.array([b"x"])}, ": the column `tags` is of type binary, not text"),
    ({"prompt": ["a", None]}, ", row 1: no prompt"),
    ({"prompt": pyarrow.array([], pyarrow.string())}, ": holds no prompt"),
    (pyarrow.table([["a"], ["b"]], names=["prompt", "prompt"]), ": has 2 columns `prompt`"),
    ({"prompt": ["a"], "tags": [{"b": 1}]}, ", row 0: a tag is {'b': 1}, not text"),
])  # fmt: skip
def test_a_parquet_that_cannot_be_meant(columns: Any, problem: str, tmp_path: Path) -> None:
    assert refused(write(tmp_path, "p.parquet", table(columns)))[0] == problem


def test_a_parquet_with_text_that_is_no_utf8(tmp_path: Path) -> None:
    ends = pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\4\0\0\0")
    bad = pyarrow.StringArray.from_buffers(2, ends, pyarrow.py_buffer(b"aa\xffa"))
    path = write(tmp_path, "p.parquet", table({"prompt": bad}))
    assert refused(path) == (", row 1: prompt is not UTF-8 at byte 1", "write it again as UTF-8")
    data = bytearray(table({"prompt": [f"prompt {number}" for number in range(1000)]}))
    data[200:600] = bytes(400)
    assert refused(write(tmp_path, "q.parquet", bytes(data)))[0].startswith(": not readable as Parquet: ")


def test_kinds_of_text_columns(tmp_path: Path) -> None:
    for kind in (pyarrow.large_string(), pyarrow.string_view(), pyarrow.dictionary(pyarrow.int8(), pyarrow.string())):
        column = pyarrow.array(["a cat"]).cast(kind)
        folder = tmp_path / f"prompt={kind}"  # names of folders are no columns
        folder.mkdir()
        assert texts(write(folder, "p.parquet", table({"prompt": column}))) == ["a cat"]


# --- Tags ------------------------------------------------------------------------------------------------------------


def test_tags_of_every_scalar_type(tmp_path: Path) -> None:
    rows = [
        {"tag": 1}, {"tags": [1, True, None, 0.5, "x"]}, {"tags": "a, b,,a"}, {"tags": None, "tag": False},
        {"tags": ["a"], "tag": "b"}, {"tags": []}, {"tag": ""},
    ]  # fmt: skip
    path = write(tmp_path, "p.jsonl", "".join(json.dumps({"prompt": "a", **row}) + "\n" for row in rows))
    expected = [("1",), ("1", "true", "0.5", "x"), ("a", "b"), ("false",), ("a", "b"), (), ()]
    assert [prompt.tags for prompt in load_prompts(path, False)] == expected
    columns = {"prompt": ["a"], "tags": [[1, 2]], "tag": [True]}
    assert load_prompts(write(tmp_path, "p.parquet", table(columns)), False)[0].tags == ("1", "2", "true")


@pytest.mark.parametrize("tag", [{"tag": ["a"]}, {"tag": {"a": 1}}, {"tags": {"a": 1}}, {"tags": [["a"]]}])
def test_a_tag_that_is_no_scalar(tag: dict[str, Any], tmp_path: Path) -> None:
    problem, hint = refused(write(tmp_path, "p.jsonl", json.dumps({"prompt": "a", **tag})))
    assert problem in (", line 1: a tag is ['a'], not text", ", line 1: a tag is {'a': 1}, not text")
    assert hint == "write tags as text, or as a list of texts"


# --- The column of the prompts ---------------------------------------------------------------------------------------


def test_a_column_of_another_name(tmp_path: Path) -> None:
    caption = Column("my caption", "eval.prompt_column")
    rows = [{"prompt": "not this", "my caption": "a cat", "target": "OPEN"}]
    files = [
        write(tmp_path, "p.jsonl", json.dumps(rows[0])),
        write(tmp_path, "p.csv", "prompt,my caption,target\nnot this,a cat,OPEN\n"),
        write(tmp_path, "p.parquet", table({name: [value] for name, value in rows[0].items()})),
    ]
    for file in files:
        assert load_prompts(file, False, caption) == [Prompt(0, "a cat", "OPEN")]
    assert refused(write(tmp_path, "p.txt", "a"), column=caption) == (
        f"eval.prompt_column = my caption, but {tmp_path / 'p.txt'} is text, a prompt a line", "remove that setting"
    )  # fmt: skip


@pytest.mark.parametrize(("name", "content", "problem"), [
    ("p.csv", "id,my text\n1,a\n", ": has no column `prompt`"),
    ("p.jsonl", '{"id": 1, "my text": "a"}\n', ", line 1: no prompt"),
    ("p.parquet", table({"id": [1], "my text": ["a"]}), ": has no column `prompt`"),
])  # fmt: skip
def test_a_missing_column_names_those_there_and_the_setting(
    name: str, content: str | bytes, problem: str, tmp_path: Path
) -> None:
    found, hint = refused(write(tmp_path, name, content), column=Column("prompt", "eval.prompt_column"))
    assert found == problem
    assert "id, my text" in hint
    command = shlex.split(hint.partition("take one of them: ")[2])
    assert command[0] == "--set"
    assert apply_sets(read_preset("words"), command[1:])["eval"]["prompt_column"] in ("id", "my text")


@pytest.mark.parametrize("name", ["text", "my text", "1", "true", "it's", '"x"', " a", "a=b", "[a]", "a\nb=1", "ä#"])
def test_an_option_in_a_hint_means_what_it_says(name: str) -> None:
    words = shlex.split(set_option("rollout.prompt_column", name))
    assert words[0] == "--set"
    assert apply_sets({}, words[1:]) == {"rollout": {"prompt_column": name}}


# --- Chats -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [
    [USER], USER, [{"role": "user", "content": [{"type": "text", "text": 'a sign "OPEN"'}]}],
    [{"role": "user", "content": [{"type": "text", "text": "a sign"}, {"type": "text", "text": '"OPEN"'}]}],
    [{"role": "user", "content": ["a sign", '"OPEN"'], "name": None}],
    [{"role": "system", "content": ""}, USER], json.dumps([USER]), str([USER]),
], ids=repr)  # fmt: skip
def test_a_chat_of_one_user_message(chat: Any, tmp_path: Path) -> None:
    expected = [Prompt(0, 'a sign "OPEN"', "OPEN")]
    assert load_prompts(write(tmp_path, "p.jsonl", json.dumps({"prompt": chat})), True) == expected
    if isinstance(chat, list) and USER in chat:
        assert load_prompts(write(tmp_path, "p.parquet", table({"prompt": [chat]})), True) == expected


@pytest.mark.parametrize(("chat", "said"), [
    ([{"role": "system", "content": "be brief"}, USER], "is a chat with a message of role 'system'"),
    ([USER, {"role": "assistant", "content": "ok"}], "is a chat with a message of role 'assistant'"),
    ([USER, USER], "is a chat of 2 user messages"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
     "is a chat whose user message holds {'type': 'image_url', 'image_url': 'x'}"),
    ([{**USER, "tool_calls": [1]}], "is a chat whose user message has `tool_calls`"),
    ([{"from": "human", "value": "x"}], "is a list with {'from': 'human', 'value': 'x'}, which is not a chat message"),
    (["a cat"], "is a list with 'a cat', which is not a chat message"),
    ('[{"role": "user", "content', "begins like a chat, but cannot be read as one: '[{\"role\": \"user\", \"content'"),
])  # fmt: skip
def test_a_chat_of_which_something_would_be_dropped(chat: Any, said: str, tmp_path: Path) -> None:
    assert refused(write(tmp_path, "p.jsonl", json.dumps({"prompt": chat})))[0] == f", line 1: the prompt {said}"


def test_an_empty_chat_is_no_prompt(tmp_path: Path) -> None:
    for chat in ([], [{"role": "user", "content": ""}], [{"role": "user", "content": None}]):
        assert refused(write(tmp_path, "p.jsonl", json.dumps({"prompt": chat})))[0] == ", line 1: no prompt"


def test_a_file_that_changes_is_read_anew(tmp_path: Path) -> None:
    path = write(tmp_path, "p.txt", "one\n")
    assert texts(path) == ["one"]
    write(tmp_path, "p.txt", "two\n")
    assert texts(path) == ["two"]


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd", "brotli", "lz4"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_a_parquet_of_any_kind_of_pages_is_read(compression: str, version: str, tmp_path: Path) -> None:
    """Several groups of rows and pages, texts repeated and not, a column of lists and one of nothing."""
    prompts = [f'a sign "{number % 7} {number if number % 3 else ""}"' for number in range(2000)]
    columns = {"prompt": prompts, "tags": [["a", "b"][: n % 3] for n in range(2000)], "negative": [None] * 2000}
    path = tmp_path / "prompts.parquet"
    parquet.write_table(
        pyarrow.table(columns), path, compression=compression, data_page_version=version, row_group_size=700,
        data_page_size=512,
    )  # fmt: skip
    assert [prompt.text for prompt in load_prompts(path, need_target=True)] == prompts


@pytest.mark.parametrize("name", ["rows_of_groups", "index_beyond_texts"])
def test_a_parquet_that_claims_more_than_it_has_is_refused_before_memory_is_taken(name: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.parquet"
    path.write_bytes((Path(__file__).parents[1] / "fuzz" / "corpus" / "parquet" / name).read_bytes())
    with pytest.raises(UserError, match="not readable as Parquet"):
        load_prompts(path, need_target=False)
