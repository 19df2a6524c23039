"""The words of the embedded data set, English and Chinese: categories, opposites, names.

from lexicon import NOUNS
NOUNS["animal"]     # [("cat", "猫"), ("dog", "狗"), ...]
"""


def _pairs(text):
    return [tuple(entry.split()) for entry in text.strip().split(",")]


# Category -> [(English, Chinese)]; no word is in two categories.
NOUNS = {
    "animal": _pairs(
        "cat 猫, dog 狗, bird 鸟, fish 鱼, horse 马, cow 牛, sheep 羊, pig 猪, tiger 老虎,"
        "lion 狮子, monkey 猴子, rabbit 兔子"
    ),
    "fruit": _pairs(
        "apple 苹果, banana 香蕉, grape 葡萄, peach 桃子, pear 梨, lemon 柠檬, mango 芒果"
    ),
    "food": _pairs(
        "rice 米饭, bread 面包, egg 鸡蛋, cheese 奶酪, soup 汤, meat 肉, cake 蛋糕, salt 盐"
    ),
    "color": _pairs(
        "red 红色, blue 蓝色, green 绿色, yellow 黄色, white 白色, black 黑色, pink 粉色,brown 棕色"
    ),
    "garment": _pairs(
        "hat 帽子, coat 外套, shirt 衬衫, shoe 鞋, sock 袜子, glove 手套, scarf 围巾"
    ),
    "vehicle": _pairs("car 汽车, bus 公交车, train 火车, ship 船, plane 飞机, truck 卡车"),
    "job": _pairs("teacher 老师, doctor 医生, nurse 护士, farmer 农民, driver 司机, singer 歌手"),
    "object": _pairs(
        "table 桌子, chair 椅子, bed 床, lamp 灯, clock 钟, box 盒子, cup 杯子, knife 刀,"
        "book 书, key 钥匙, bag 包, ball 球"
    ),
}
CATEGORIES_ZH = {
    "animal": "动物",
    "fruit": "水果",
    "food": "食物",
    "color": "颜色",
    "garment": "衣物",
    "vehicle": "车船",
    "job": "职业",
    "object": "物品",
}
OPPOSITES = _pairs(
    "hot cold, big small, long short, fast slow, new old, happy sad, open closed, bright dark,"
    "rich poor, wet dry, full empty, high low, hard soft, early late, clean dirty, strong weak,"
    "thick thin, near far, true false, left right, up down, day night, good bad, loud quiet"
)
OPPOSITES_ZH = _pairs(
    "热 冷, 大 小, 长 短, 快 慢, 新 旧, 高 低, 开 关, 明 暗, 富 穷, 湿 干, 满 空, 硬 软, 早 晚,"
    "强 弱, 厚 薄, 远 近, 真 假, 左 右, 上 下, 好 坏, 宽 窄, 深 浅, 买 卖, 轻 重"
)
PEOPLE = "Tom Ann Ben Eva Max Lily Jack Mary Sam Nora".split()
PEOPLE_ZH = "小明 小红 小刚 小丽 小华 小美 小强 小芳".split()
CITIES = "Paris London Rome Berlin Tokyo Madrid Cairo Oslo".split()
CITIES_ZH = "北京 上海 广州 南京 成都 武汉 西安 天津".split()

WORDS = [pair for pairs in NOUNS.values() for pair in pairs]
CATEGORY_OF = {english: name for name, pairs in NOUNS.items() for english, _ in pairs}
COLORS = NOUNS["color"]
THINGS = NOUNS["garment"] + NOUNS["object"]
