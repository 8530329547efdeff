"""What is known of languages beside their statistics: letters that their alphabets lack, and how rare they are.

Alphabets are those of the orthographies (letters behind ASCII, small); loan words' letters are in where they are usual.
"""

_LATIN = {
    "af": "áèéêëíîïóôöúû",
    "az": "çəğıöşü",
    "bs": "ćčđšž",
    "ca": "àçèéíïòóúü",
    "cs": "áčďéěíňóřšťúůýž",
    "cy": "áâéêëîïòôöûŵŷ",
    "da": "åæéø",
    "de": "äöüß",
    "en": "",
    "eo": "ĉĝĥĵŝŭ",
    "es": "áéíñóúü",
    "et": "äõöüšž",
    "eu": "ñü",
    "fi": "äåöšž",
    "fr": "àâæçèéêëîïôùûüÿœ",
    "ga": "áéíóú",
    "gl": "áéíïñóúü",
    "hr": "ćčđšž",
    "hu": "áéíóöőúüű",
    "id": "é",
    "is": "áæéíðóöúýþ",
    "it": "àèéìíîòóùú",
    "la": "",
    "lt": "ąčęėįšųūž",
    "lv": "āčēģīķļņšūž",
    "ms": "é",
    "nl": "áéëíïóöúüè",
    "nn": "àåæéòóôø",
    "no": "àåæéòóôø",
    "oc": "àáçèéíïòóúü",
    "pl": "ąćęłńóśźż",
    "pt": "àáâãçéêíóôõúü",
    "ro": "âîăşșţț",
    "sh": "ćčđšž",
    "sk": "áäčďéíĺľňóôŕšťúýž",
    "sl": "čšž",
    "sq": "çë",
    "sv": "äåéö",
    "sw": "",
    "tl": "ñ",
    "tr": "âçğîıöşûü",
    "vi": "àáâãèéêìíòóôõùúýăđĩũơưạảấầẩẫậắằẳẵặẹẻẽếềểễệỉịọỏốồổỗộớờởỡợụủứừửữựỳỵỷỹ",
}
_CYRILLIC = {
    "be": "абвгдеёжзійклмнопрстуўфхцчшыьэюя",
    "bg": "абвгдежзийклмнопрстуфхцчшщъьюя",
    "mk": "абвгдѓежзѕијклљмнњопрстќуфхцчџшѐѝ",
    "ru": "абвгдеёжзийклмнопрстуфхцчшщъыьэюя",
    "sr": "абвгдђежзијклљмнњопрстћуфхцчџш",
    "uk": "абвгґдеєжзиіїйклмнопрстуфхцчшщьюя",
}
_PERSIAN = "ءآأؤئابپتثجچحخدذرزژسشصضطظعغفقکكگلمنوهةیىي"
_ARABIC = {
    "ar": "ءآأؤإئابةتثجحخدذرزسشصضطظعغفقكلمنهوىي",
    "fa": _PERSIAN,
    "ur": _PERSIAN + "ٹڈڑںھہۂۃےۓ",
}


def _foreign(alphabets: dict[str, str]) -> dict[str, frozenset[str]]:
    known = frozenset("".join(alphabets.values()))
    return {code: known - frozenset(letters) for code, letters in alphabets.items()}


FOREIGN_LETTERS: dict[str, frozenset[str]] = _foreign(_LATIN) | _foreign(_CYRILLIC) | _foreign(_ARABIC)
"""Language -> letters of its script that other alphabets have and its own lacks."""

_WIDELY_WRITTEN = "en zh es fr de ja ko ru pt it nl pl tr ar vi id uk sv cs fa he th el ro hu hi da fi no"
_WRITTEN = "bg ca et hr lt lv sk sl sr"
_KIN = "af als an ast bar be bh bs eu fy gl lb li mk mr ms nds ne sa scn sco sh vec eo ia ie io la vo"
FREQUENCY: dict[str, float] = {
    **dict.fromkeys(_WIDELY_WRITTEN.split(), 1.0),
    **dict.fromkeys(_WRITTEN.split(), 0.6),
    **dict.fromkeys(_KIN.split(), 0.3),
}
"""fastText takes all its languages for equally likely. Chats in Malay, Galician or Latin are far rarer than those in
their neighbours, with which they are mixed up: Indonesian, Portuguese, Italian. A clear score outweighs this."""
OTHER_FREQUENCY = 0.5
