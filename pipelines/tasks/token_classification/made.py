"""Texts with personal data, made from templates with the package Faker: the offline demo. All people in them are invented.

Templates, first and last names, streets and cities of validation and test are none of training's. Half of the templates also have
look-alikes, which are no personal data: order numbers, prices, versions, times, firms called after people, towns without an address.
"""

from __future__ import annotations

import calendar
import re
import zlib
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np

from pipelines.core.errors import InputError
from pipelines.data.kinds import SPLITS

SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}
LOCALES = ("en_GB", "en_US", "de_DE", "fr_FR", "it_IT", "nl_NL")
SLOT = re.compile(r"\{(\w+)(?::0(\d))?\}")  # its name, and how many digits a number has at least

# By split. Capital slots are personal data; the others are look-alikes. Without any words around them a model would learn these sentences by heart.
TEMPLATES = {
    "train": """
        My name is {NAME} and my order {order} never arrived.
        Please send the parcel to {ADDRESS}, not to the depot in {town}.
        You can reach {NAME} at {MAIL} or {PHONE}.
        Dear {NAME}, your payment of {price} was received on {DATE}.
        I moved to {ADDRESS} on {DATE}; please update the file of {NAME}.
        The refund of {price} goes to {IBAN}.
        Version {version} fixed the crash that {NAME} reported on {DATE}.
        Call me on {PHONE} between {time} and {time}.
        {NAME} ({MAIL}) asked for a copy of invoice {order}.
        The account {IBAN} belongs to {NAME}, born on {DATE}.
        We met at {firm} in {town} at {time}.
        Ticket {order} was closed by the support team of {firm}.
        Write to {MAIL} if the price of {price} is wrong.
        Patient {NAME}, {DATE}, was seen at {time}.
        The new tenant of {ADDRESS} is {NAME}.
        {firm} sells the {product} for {price}.
        Our shop in {town} is open 24/7 and has {count} seats.
        From: {NAME} <{MAIL}>
        Tel. {PHONE}, IBAN {IBAN}
        Room {count}, shelf {order}, part {version}.
        {NAME} and {NAME} signed the contract on {DATE} in {town}.
        Ship {count} units of {product} to {firm}, {ADDRESS}.
        The {product} has serial number {order} and firmware {version}.
        Between {town} and {town} the train takes {count} minutes.
        Is {PHONE} still the number of Mr {LASTNAME}?
        Thanks, {FIRSTNAME}
        In May the team of {firm} will march for {count} miles.
        Will the mark of {count} be reached by {firm}?
        Send it to {MAIL}. My number is {PHONE}.
        Contact {NAME}, {PHONE}, or the office in {town}.
        Her e-mail is {MAIL}, his is {MAIL}.
        Mail: {MAIL}
        Name: {NAME}; phone: {PHONE}; mail: {MAIL}
        Please confirm by {DATE}.
        Paid on {DATE}, {price}, from {IBAN}.
        The IBAN is {IBAN}.
        {NAME} called from {PHONE}.
        Is it true that {NAME}, who lives at {ADDRESS}, owns {count} shops?
        Home address: {ADDRESS}.
        {ADDRESS} is where {firm} had its first shop.
        The letter of {DATE} was signed by {NAME}.
        No answer under {PHONE}; I tried {count} times.
        Regards, {NAME}
        Kind regards
        {FIRSTNAME}, can you check order {order}?
        Mr and Mrs {LASTNAME} have booked room {count} until {DATE}.
        I spoke to {FIRSTNAME} at {firm} about ticket {order}.
        My colleague {NAME} ({PHONE}) will come at {time}.
        The invoice {order} of {price} is due.
        {firm} in {town} closes at {time}.
        {town} has {count} parks, {town} has {count}.
        Version {version} is out, and {version} will follow.
        The model {order} costs {price}, the {product} {price}.
        Part number {order}.
        It weighs {count} kg and runs firmware {version}.
        Bring your {product} to {firm} in {town}.
        {words} {NAME} {words}.
        {words} {NAME}, {words}.
        {words} {FIRSTNAME} {words}.
        {words} {LASTNAME} {words}.
        {words} {MAIL} {words}.
        {words}, {MAIL}.
        {MAIL} {words}, {MAIL} {words}.
        {words} {PHONE} {words}.
        {words}, {PHONE}, {words}.
        {words} {IBAN} {words}.
        {words} {NAME}, {IBAN}, {words} {DATE}.
        {words} {NAME}, {MAIL}, {words} {PHONE}.
        {words} {DATE} {words}.
        {words} {ADDRESS} {words}.
        {words} {ADDRESS}, {words} {PHONE}.
        {words} {order} {words}, {words} {price}.
        {words} {firm} {words} {time}.
        {words} {town}, {words} {count} {words}.
        {words} {version} {words} {product}.
        {words}, {words}.
    """,
    "validation": """
        This is {NAME}; the {product} with number {order} is broken.
        Kindly transfer {price} from {IBAN} before {DATE}.
        Deliver it to {ADDRESS} or ring {PHONE}.
        Our contact at {firm} is {NAME}, {MAIL}.
        Release {version} needs {count} MB and was built at {time}.
        Best wishes, {FIRSTNAME}
        The bus from {town} leaves at {time} and costs {price}.
        Forward this to {MAIL}, please.
        {NAME}'s mobile, {PHONE}, is switched off.
        On {DATE} the flat at {ADDRESS} was sold.
        Account holder {NAME}, {IBAN}.
        {MAIL} bounced, {MAIL} did not.
        Article {order} of {firm} is sold out until {time}.
        Nobody named {LASTNAME} works at {firm}.
    """,
    "test": """
        Could somebody tell {NAME} that {product} number {order} is ready?
        {NAME} lives at {ADDRESS} and was born on {DATE}.
        I paid {price} by transfer from {IBAN} on {DATE}, see receipt {order}.
        If you have questions, mail {MAIL} or phone {PHONE} after {time}.
        The update to {version} takes {count} minutes, says {firm}.
        Hello, {FIRSTNAME} here, my new address is {ADDRESS}.
        Neither {firm} nor the branch in {town} knows a Mrs {LASTNAME}.
        Reply to {MAIL}, cc {MAIL}.
        A table for {count} at {time} under the name of {LASTNAME}, please.
        Our hotel in {town} charges {price} a night for room {count}.
        Bank details of {NAME}: {IBAN}
        {firm} was founded in {town} and employs {count} people.
        The appointment of {NAME} moves from {DATE} to {DATE}.
        Contact: {NAME}, {ADDRESS}, {PHONE}
        Rose petals, price {price}, article {order}, for {firm}.
    """,
}
# What a slot is made of: a method of Faker whose names are those of one split alone; its letters; a number from the first on and below the
# second; one of several forms, in which # is a digit and ? a letter where there are such.
NAMES = {"FIRSTNAME": "first_name", "LASTNAME": "last_name", "street": "street_name", "town": "city"}
LETTERS = {"first": "FIRSTNAME", "last": "LASTNAME"}
NUMBERS = {
    "count": (2, 400),
    "cents": (10, 100),
    "part": (0, 30),
    "hour": (0, 24),
    "minute": (10, 60),
    "day": (1, 29),
    "month": (1, 13),
    "year": (1940, 2030),
}
FORMS: dict[str, tuple[str, ...]] = {
    "NAME": ("{FIRSTNAME} {LASTNAME}", "{FIRSTNAME} {LASTNAME}", "{LASTNAME}, {FIRSTNAME}"),
    "MAIL": ("{first}.{last}@{free_email_domain}", "{last}{count}@{domain_name}", "info@{domain_name}"),
    "ADDRESS": (
        "{building_number} {street}, {town} {postcode}",
        "{street} {building_number}, {postcode} {town}",
        "{count} {street}, {town}",
    ),
    "PHONE": ("{phone_number}", "+## ### #######", "0### ######", "(0##) ### ####"),
    "DATE": (
        "{day}/{month}/{year}",
        "{day}.{month}.{year}",
        "{year}-{month:02}-{day:02}",
        "{day} {month_name} {year}",
        "{month_name} {day}, {year}",
    ),
    "order": ("??-########", "### #### ####", "??## #### #### ####", "20##/#####"),
    "price": ("£{count}.{cents}", "{count},{cents} EUR"),
    "version": ("{part}.{part}", "{part}.{part}.{part}"),
    "time": ("{hour}:{minute}",),
    "product": (
        "kettle",
        "Galaxy phone",
        "Bosch drill",
        "Paris lamp",
        "Victoria sofa",
        "Jordan shoe",
        "router",
        "desk",
    ),
    "firm": (
        "{LASTNAME} & Sons",
        "{LASTNAME} Ltd",
        "{LASTNAME} GmbH",
        "Hotel {LASTNAME}",
        "{LASTNAME} Airlines",
        "the {LASTNAME} Institute",
    ),
}


def made_texts(count: int) -> dict[str, datasets.Dataset]:
    """So many texts of one to three sentences, by split, with the columns `text` and `label`: their spans."""
    try:
        from faker import Faker
    except ImportError as error:
        raise InputError(
            "expected the package faker for --made_texts, found none. Run pip install 'pocketformers[demo]', or give a --dataset."
        ) from error
    fakers = [Faker(locale) for locale in LOCALES]
    for faker in fakers:
        faker.seed_instance(0)
        # In an order of its own: the package's is that of a set for some, another one in every process.
        for provider in faker.get_providers():
            if hasattr(provider, "cities"):
                provider.cities = sorted({*provider.cities})
    generator = np.random.default_rng(0)
    splits = {}
    for split in SPLITS:
        draw = _values(fakers, split, generator)
        templates = [line.strip() for line in TEMPLATES[split].strip().splitlines()]
        texts = [_text(templates, draw, generator) for _ in range(round(count * SHARES[split]))]
        rows = {"text": [text for text, _ in texts], "label": [spans for _, spans in texts]}
        splits[split] = datasets.Dataset.from_dict(rows)
    return splits


def split_of(name: str) -> str:
    """The only split that a name may stand in, by its hash."""
    share = zlib.crc32(name.encode()) % 100 / 100
    return "train" if share < 0.7 else "validation" if share < 0.8 else "test"


def _text(templates: list[str], draw: Callable[[str], Any], generator: Any) -> tuple[str, list[dict[str, Any]]]:
    text, spans = "", []
    for template in generator.choice(templates, generator.integers(1, 4), replace=False):
        text += str(generator.choice([" ", "\n"], p=[0.8, 0.2])) if text else ""
        last = 0
        for slot in SLOT.finditer(str(template)):
            text += template[last : slot.start()]
            value = str(draw(slot[1]))
            if slot[1].isupper():
                label = "NAME" if slot[1].endswith("NAME") else slot[1]
                spans.append({"start": len(text), "end": len(text) + len(value), "label": label})
            text += value
            last = slot.end()
        text += template[last:]
    return text, spans


def _values(fakers: list[Any], split: str, generator: Any) -> Callable[[str], Any]:
    """A function that draws a value for a slot: of NAMES, NUMBERS or FORMS, or else what a method of Faker with this name gives."""
    words = sorted({*fakers[1].get_words_list()})

    def of_any_locale(method: str) -> str:
        return str(getattr(fakers[generator.integers(len(fakers))], method)())

    def draw(slot: str) -> Any:
        if slot in NAMES:
            while split_of(name := of_any_locale(NAMES[slot])) != split:
                pass
            return name
        if slot in LETTERS:
            return re.sub(r"\W+", "", draw(LETTERS[slot]).lower()) or "x"
        if slot in NUMBERS:
            return int(generator.integers(*NUMBERS[slot]))
        if slot == "month_name":
            return calendar.month_name[draw("month")]
        if slot == "words":
            return " ".join(generator.choice(words, generator.integers(1, 5)))
        if slot == "IBAN":
            iban = of_any_locale("iban")
            return re.sub(r"(.{4})(?=.)", r"\1 ", iban) if generator.integers(2) else iban
        if slot not in FORMS:
            return of_any_locale(slot)
        form = FORMS[slot][generator.integers(len(FORMS[slot]))]
        if "#" in form:
            return fakers[0].bothify(form).upper()
        return SLOT.sub(lambda found: str(draw(found[1])).zfill(int(found[2] or 0)), form)

    return draw
