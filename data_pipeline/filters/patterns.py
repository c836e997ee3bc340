"""Personal data in texts: patterns that propose, and checks that decide.

  email   a local part and a domain with a top level
  card    payment cards: the lengths and first digits that issuers use, and the Luhn check digit (ISO/IEC 7812-1)
  iban    bank accounts: the country's length and the two check digits modulo 97 (ISO 13616)
  ip      addresses that Python's `ipaddress` takes, of four numbers or of groups of hexadecimal digits
  phone   +49 170 1234567, (555) 123-4567, 0170/1234567, 01 23 45 67 89: an international prefix, or groups as they are
          written; bare digits are not taken for a phone number

Every pattern is bounded, so that no text takes longer than its length allows.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable

# ISO 13616: characters of an IBAN and the countries that have so many (SWIFT's registry)
_IBAN_COUNTRIES = {
    15: "NO",
    16: "BE",
    18: "DK FI FK FO GL NL SD",
    19: "MK SI",
    20: "AT BA EE KZ LT LU MN XK",
    21: "CH CR HR LI LV",
    22: "BG BH DE GB GE IE ME RS VA",
    23: "AE GI IL IQ OM SO TL",
    24: "AD CZ ES MD PK RO SA SE SK TN VG",
    25: "LY PT ST",
    26: "IS TR",
    27: "BI DJ FR GR IT MC MR SM",
    28: "AL AZ BY CY DO GT HU LB NI PL SV",
    29: "BR EG PS QA UA",
    30: "JO KW MU YE",
    31: "MT SC",
    32: "LC",
    33: "RU",
}
_IBAN_LENGTHS = {country: length for length, countries in _IBAN_COUNTRIES.items() for country in countries.split()}

MOST_GROUPS = 5  # of digits in the number of a card

_EMAIL = re.compile(r"(?<![\w.+%-])[\w.+%-]{1,64}@(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,8}[^\W\d_]{2,24}(?![\w-])")
_DIGITS = re.compile(r"(?<![\w.+-])\d(?:[ -]?\d){12,60}(?!\w|[-.,]\d)")
_IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,29}", re.IGNORECASE | re.ASCII)
_IPV4 = re.compile(r"(?<![\w.-])\d{1,3}(?:\.\d{1,3}){3}(?!\w|[.-]\w)")
_IPV6 = re.compile(r"(?<![\w.])(?<![0-9a-f:]:)(?:[0-9a-f]{0,4}:){2,7}[0-9a-f]{0,4}(?![\w:])", re.IGNORECASE | re.ASCII)
_PHONE = re.compile(
    r"(?<![\w.,/+-])(?:"
    r"(?:\+[1-9]|00[1-9]\d{0,2}[ ./-]\d)(?:[ ./-]?(?:\(\d{1,4}\)|\d)){6,14}"  # international (E.164: at most 15 digits)
    r"|(?:1[ .-])?(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4}"  # North America
    r"|(?:\(0\d{1,4}\)|0\d{1,4})[ /-]\d{3,8}(?:[ -]\d{2,6}){0,3}"  # a national prefix, then groups
    r"|0[1-9](?:[ .-]\d{2}){4}"  # pairs
    r")(?!\w|[-./,]\d)"
)


def find_personal_data(text: str, kinds: tuple[str, ...]) -> list[tuple[int, int, str]]:
    """(start, end, kind) of everything found, in order; where two would overlap, the first in KINDS."""
    found: list[tuple[int, int, str]] = []
    for kind, find in KINDS.items():
        if kind in kinds:
            places = find(text)
            found += [(*place, kind) for place in places]
            text = _blanked(text, places)
    return sorted(found)


def _blanked(text: str, places: list[tuple[int, int]]) -> str:
    """The text, as long as it was, with what was found as something that no pattern takes for a part of its own."""
    parts, done = [], 0
    for start, end in sorted(places):
        parts += [text[done:start], "\0" * (end - start)]
        done = end
    return "".join([*parts, text[done:]])


def luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of those before it."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def is_card(digits: str) -> bool:
    """Whether some digits are the number of a payment card, by issuer, length and check digit."""
    two, length = int(digits[:2]), len(digits)
    issued = (
        (digits[0] == "4" and length in (13, 16, 19))  # Visa
        or ((51 <= two <= 55 or 22 <= two <= 27) and length == 16)  # Mastercard
        or (two in (34, 37) and length == 15)  # American Express
        or (two in (30, 36, 38, 39) and length in (14, 16))  # Diners Club
        or (two == 35 and length == 16)  # JCB
        or (two in (50, 56, 57, 58, 60, 61, 62, 63, 64, 65, 67) and 16 <= length <= 19)  # Discover, UnionPay, Maestro
    )
    return issued and luhn(digits)


def is_iban(text: str) -> bool:
    """Whether capital letters and digits without blanks are an IBAN, by its length and check digits."""
    if _IBAN_LENGTHS.get(text[:2]) != len(text):
        return False
    return int("".join(str(int(character, 36)) for character in text[4:] + text[:4])) % 97 == 1


def _emails(text: str) -> list[tuple[int, int]]:
    return [match.span() for match in _EMAIL.finditer(text)] if "@" in text else []


def _cards(text: str) -> list[tuple[int, int]]:
    """Whole groups of digits, among others such as a date of expiry: the longest that is a card from the first on."""
    found = []
    for match in _DIGITS.finditer(text):
        groups = [(group[0], *group.span()) for group in re.finditer(r"\d+", match[0])]
        first = 0
        while first < len(groups):
            for last in reversed(range(first, min(first + MOST_GROUPS, len(groups)))):
                digits = "".join(group for group, _, _ in groups[first : last + 1])
                if 13 <= len(digits) <= 19 and is_card(digits):
                    found.append((match.start() + groups[first][1], match.start() + groups[last][2]))
                    first = last
                    break
            first += 1
    return found


def _ibans(text: str) -> list[tuple[int, int]]:
    """The pattern may run on into words behind the number: as much is taken as its country's length."""
    found = []
    for match in _IBAN.finditer(text):
        places = [place for place in range(*match.span()) if text[place] != " "]
        length = _IBAN_LENGTHS.get(match[0][:2].upper(), len(places) + 1)
        if length > len(places):
            continue
        end = places[length - 1] + 1
        if not text[end : end + 1].isalnum() and is_iban(match[0][: end - match.start()].replace(" ", "").upper()):
            found.append((match.start(), end))
    return found


def _addresses(text: str) -> list[tuple[int, int]]:
    found = [match.span() for match in _IPV4.finditer(text) if _is_address(match[0])]
    if ":" in text:
        found += [
            match.span()
            for match in _IPV6.finditer(text)
            if any(map(str.isdigit, match[0])) and _is_address(match[0].lower())
        ]
    return found


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _phones(text: str) -> list[tuple[int, int]]:
    return [match.span() for match in _PHONE.finditer(text) if 9 <= sum(map(str.isdigit, match[0])) <= 17]


KINDS: dict[str, Callable[[str], list[tuple[int, int]]]] = {
    "email": _emails,
    "iban": _ibans,
    "card": _cards,
    "ip": _addresses,
    "phone": _phones,
}
