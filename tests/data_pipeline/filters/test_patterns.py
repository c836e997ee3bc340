"""Personal data in texts: what is found to the letter, and what looks like it and is not."""

import pytest

from data_pipeline.filters.patterns import KINDS, find_personal_data, is_card, is_iban, luhn

FOUND = {
    "email": [
        "ann@example.org",
        "a.b+c_d%e@mail.example.co.uk",
        "jürgen@müller.de",
        "x@1-2.example.museum",
        "ANN@EXAMPLE.ORG",
    ],
    "card": [
        "4111111111111111",
        "4111 1111 1111 1111",
        "4111-1111-1111-1111",
        "5555555555554444",
        "2223003122003222",
        "3782 822463 10005",
        "6011111111111117",
        "3530111333300000",
        "30569309025904",
        "4222222222222",
    ],
    "iban": [
        "DE89 3704 0044 0532 0130 00",
        "DE89370400440532013000",
        "GB29 NWBK 6016 1331 9268 19",
        "NO93 8601 1117 947",
        "MT84MALT011000012345MTLCAST001S",
        "fr14 2004 1010 0505 0001 3m02 606",
    ],
    "ip": [
        "192.168.0.1",
        "8.8.8.8",
        "2001:db8::8a2e:370:7334",
        "fe80:0:0:0:200:f8ff:fe21:67cf",
        "::ffff:10",
        "2001:DB8::1",
    ],
    "phone": [
        "+49 170 1234567",
        "+4917012345678",
        "+1 (555) 123-4567",
        "+44 20 7946 0958",
        "+49 (0)170 1234567",
        "0049 170 1234567",
        "(555) 123-4567",
        "555-123-4567",
        "1-800-555-0199",
        "0170/1234567",
        "030 12345678",
        "0171 234 5678",
        "(030) 1234567",
        "01 23 45 67 89",
        "020 7946 0958",
    ],
}  # fmt: skip

NOT_FOUND = [
    "4111111111111112",  # Luhn
    "1234567812345670",  # Luhn holds, but no issuer starts with 12
    "0000000000000000",
    "41111111111111110",  # 17 digits
    "411111111111111",  # 15
    "id 94111111111111111",
    "item-4111111111111111",
    "4111111111111111.5",
    "DE89370400440532013001",  # check digits
    "DE8937040044053201300",  # too short
    "XX89370400440532013000",
    "ADE89370400440532013000",
    "256.1.1.1",
    "1.2.3",
    "v1.2.3.4",
    "1.2.3.4.5",
    "at 12:30:45",
    "std::vector",
    "add::bad",
    "ratio 16:9",
    "00:1A:2B:3C:4D:5E:6F:70:81:92",
    "ann@localhost",
    "@ann on the web",
    "a @ b.com",
    "2024-01-05",
    "05-12-2024",
    "12/05/2024 10:30",
    "1234567890",
    "0123456789012",
    "IMG_20240105_123456",
    "photo 100 of 1000000",
    "3 000 000 people in 2 cities",
    "1920 x 1080",
    "1/2/2024",
    "ISBN 978-3-16-148410-0",
    "two 555-1234 numbers",
    "$1,000,000.00",
    "3.14159265358979",
]


def kinds_in(text: str) -> list[tuple[str, str]]:
    return [(text[start:end], kind) for start, end, kind in find_personal_data(text, tuple(KINDS))]


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in FOUND.items() for text in texts])
def test_true_ones_are_found_whole_wherever_they_stand(kind: str, text: str) -> None:
    for frame in (
        "{}",
        "write to {} today",
        "({})",
        "“{}”",
        "{}, or not",
        "so: {}.",
        "x {}; y",
        "Tel/Mail: {}",
        "日本 {} 語",
    ):
        assert kinds_in(frame.format(text)) == [(text, kind)]


@pytest.mark.parametrize("text", NOT_FOUND)
def test_what_only_looks_like_it_is_left(text: str) -> None:
    assert kinds_in(text) == []
    assert kinds_in(f"a sign with {text} on it") == []


def test_several_in_one_text_are_told_apart() -> None:
    text = "a@b.de 4111 1111 1111 1111 12/27 DE89 3704 0044 0532 0130 00 THANKS 10.0.0.1 +49 170 1234567"
    assert [kind for _, kind in kinds_in(text)] == ["email", "card", "iban", "ip", "phone"]
    assert kinds_in("Host:2001:db8::1") == [("2001:db8::1", "ip")]
    assert kinds_in("430 4111111111111111") == [("430 4111111111111111", "card")]  # of 19 digits; so are the last 16
    assert kinds_in("12 4111 1111 1111 1111 2027") == [("4111 1111 1111 1111", "card")]
    assert find_personal_data(text, ("ip",)) == [(text.index("10.0"), text.index("10.0") + 8, "ip")]


@pytest.mark.parametrize("digit", range(10))
def test_luhn_takes_one_check_digit_of_ten(digit: int) -> None:
    """7992739871x, the example of ISO/IEC 7812-1's annex as it is usually given: x is 3."""
    assert luhn(f"7992739871{digit}") == (digit == 3)


def test_every_wrong_digit_is_noticed() -> None:
    card, iban = "4111111111111111", "DE89370400440532013000"
    assert is_card(card)
    assert is_iban(iban)
    for place in range(16):
        for digit in "0123456789":
            assert is_card(card[:place] + digit + card[place + 1 :]) == (digit == card[place])
    for place in range(2, 22):
        for digit in "0123456789":
            assert is_iban(iban[:place] + digit + iban[place + 1 :]) == (digit == iban[place])


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "unit", ["a", "1", "a.", "1 ", "1.", "a@", "+1", "0-1", "(0", "::", "a:", "DE12 ", "00 ", "@a."]
)
def test_hostile_texts_take_no_more_than_their_length(unit: str) -> None:
    """A long text; a pattern that goes back over what it has seen would take hours."""
    find_personal_data(unit * (200_000 // len(unit)), tuple(KINDS))
