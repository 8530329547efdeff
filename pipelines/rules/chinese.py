"""Whether Chinese is written in simplified or traditional characters."""

# The characters that only one of the two has: the 250 most frequent simplified ones in real chats (86 % of all
# occurrences of such characters), and their traditional forms. Those that both use (后, 里, 台) tell nothing.
_SIMPLIFIED = frozenset(
    "个为这们数并来对时会动将学过发关应进题与问机体间计创现务类户业实开经语当么设决标产该电变从帮点国统给结选组术说网内习无导"
    "还请项写气响单处员别识词测两论样长试输验让运话没总资码复图认强义战调够许获区构质择风议环观险传备场预节视乐减参达况记线专"
    "释联车续则编优细吗证维队约带戏评虑领护师简见书练检随疗转训尔历态规销积轻满潜营级团报条独换难终称欢状爱络温压热库宝错号觉"
    "医寻断权显梦键费杂头软误离尽访装马兴较执织围亚拥击声远负储连励讨诉购须罗门际读势听众阳灵争职继页块课骤责树录仅买协询济边"
    "伤监链谢异闻频属张东"
)
_TRADITIONAL = frozenset(
    "個箇爲這們數並併來對時會動將學過發髮關應進題與問機體間計創現務類戶業實開經語當噹麼設決標產該電變從幫點國統給結選組術朮說"
    "網內習無導還請項寫氣響單處員別彆識詞測兩論樣長試輸驗讓運話沒總資碼復複圖認強義戰調夠許獲穫區構質擇風議環觀險傳備場預節視"
    "樂減參蔘達況記線專釋聯車續則編優細嗎證証維隊約帶戲評慮領護師簡見書練檢隨療轉訓爾歷曆態規銷積輕滿潛營級團糰報條獨換難終稱"
    "歡狀愛絡溫壓熱庫寶錯號覺醫尋斷權顯夢鍵費雜頭軟誤離盡儘訪裝馬興較執織圍亞擁擊聲遠負儲連勵討訴購須鬚羅門際讀勢聽衆陽靈爭職"
    "繼頁塊課驟責樹錄彔僅買協詢濟邊傷監鏈鍊謝異聞頻屬張東"
)


def chinese_script(text: str) -> str:
    """zh-Hans or zh-Hant by the majority of telling characters; zh where there are none, or as many of each."""
    num_simplified = sum(character in _SIMPLIFIED for character in text)
    num_traditional = sum(character in _TRADITIONAL for character in text)
    if num_simplified == num_traditional:
        return "zh"
    return "zh-Hans" if num_simplified > num_traditional else "zh-Hant"
