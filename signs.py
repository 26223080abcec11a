"""Street scenes with signs, drawn from a seed: the pictures behind `data.Signs`.

AVQ's Figure 1 is a photo of a shop whose sign a plain VQGAN cannot keep: the global structure
survives the latents, the letters do not. These pictures have both: sky, facades, windows and a road
that a small first stage can learn, and words in strokes one pixel wide (at 64 px) that it cannot. A
scene is laid out in 64ths of the picture, so it scales; letters are a 5x7 face scaled by whole
numbers, so they stay crisp, the same on every machine.

    rng -> sky -> street from the front or along it -> boards with words -> uint8 (size,size,3)

Not here: which rng draws which picture, and batches (data.py).
"""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

# Seven rows of five bits, two hexadecimal digits each, from the top; columns without ink are cut.
GLYPHS = {
    "A": "0E11111F111111", "B": "1E11111E11111E", "C": "0E11101010110E", "D": "1E11111111111E",
    "E": "1F10101E10101F", "F": "1F10101E101010", "G": "0E11101711110F", "H": "1111111F111111",
    "I": "07020202020207", "J": "0702020202120C", "K": "11121418141211", "L": "1010101010101F",
    "M": "111B1515111111", "N": "11111915131111", "O": "0E11111111110E", "P": "1E11111E101010",
    "Q": "0E11111115120D", "R": "1E11111E141211", "S": "0F10100E01011E", "T": "1F040404040404",
    "U": "1111111111110E", "V": "11111111110A04", "W": "1111111515150A", "X": "11110A040A1111",
    "Y": "11110A04040404", "Z": "1F01020408101F",
}
FIRST_WORDS = ("OLD", "NEW", "BIG", "CITY", "BLUE", "GRAND", "ROYAL", "GREEN", "NORTH", "LITTLE",
               "HARBOR", "GOLDEN", "RED", "PARK", "UNION", "QUICK", "CORNER", "LUCKY", "HAPPY")
LAST_WORDS = ("CAFE", "HOTEL", "BAKERY", "MARKET", "BOOKS", "PIZZA", "SHOES", "FLORIST", "CINEMA",
              "BANK", "BAR", "MUSEUM", "TAILOR", "THEATER", "DINER", "GRILL", "KIOSK", "TOYS",
              "GALLERY", "JAZZ", "WINE", "FISH", "TEA")
SHORT_WORDS = ("STOP", "OPEN", "TAXI", "EXIT", "SALE", "BUS", "ZOO", "INN", "ONE WAY", "SLOW",
               "SHOP", "METRO", "PARKING", "CLOSED", "MUSIC", "QUAY", "VIEW", "BIKES", "JUICE",
               "LUNCH")

SKIES = (((84, 140, 208), (200, 226, 242)), ((120, 168, 206), (250, 228, 196)),
         ((150, 160, 174), (220, 224, 226)), ((92, 78, 130), (248, 180, 126)),
         ((60, 120, 190), (170, 208, 236)))
NIGHT_SKY = (22, 28, 62), (88, 84, 136)
WALLS = ((164, 88, 68), (226, 208, 170), (206, 158, 88), (152, 152, 156), (106, 126, 150),
         (206, 144, 132), (144, 162, 132), (232, 228, 218), (122, 66, 58), (96, 142, 146))
DOORS = ((120, 50, 40), (40, 84, 72), (52, 62, 110), (92, 64, 40), (36, 36, 40))
BOARDS = (((196, 30, 36), (255, 255, 255)), ((22, 40, 96), (255, 255, 255)),
          ((18, 78, 52), (252, 244, 214)), ((24, 24, 26), (250, 208, 84)),
          ((250, 250, 246), (190, 24, 32)), ((252, 212, 40), (20, 20, 20)),
          ((16, 110, 120), (255, 255, 255)), ((250, 240, 214), (70, 36, 20)),
          ((250, 250, 250), (18, 44, 120)), ((110, 20, 44), (255, 226, 130)),
          ((232, 112, 28), (255, 255, 255)), ((30, 30, 40), (120, 240, 220)))


def shade(colour, factor):
    """`colour` times `factor`, kept in range."""
    return tuple(min(255, round(channel * factor)) for channel in colour)


@lru_cache(maxsize=4096)
def word_mask(text, scale, upright=False):
    """The ink of `text` as a Pillow "L" image, 7·scale px high; `upright` stacks the letters."""
    letters = [_letter(letter) for letter in text]
    if upright:
        sides = [((5 - a.shape[1]) // 2, (6 - a.shape[1]) // 2) for a in letters]
        ink = np.concatenate([np.pad(a, ((0, 2), side)) for a, side in zip(letters, sides)])[:-2]
    else:
        ink = np.concatenate([np.pad(a, ((0, 0), (0, 1))) for a in letters], 1)[:, :-1]
    mask = Image.fromarray(ink * np.uint8(255))
    if scale == 1:
        return mask
    # Smooth enlargement, then its edge made steep again: round strokes instead of stairs.
    mask = mask.resize((mask.width * scale, mask.height * scale), Image.Resampling.BICUBIC)
    return mask.point([min(255, max(0, (v - 128) * scale + 128)) for v in range(256)])


def _letter(letter):
    if letter == " ":
        return np.zeros((7, 3), np.uint8)
    rows = np.array([int(GLYPHS[letter][i:i + 2], 16) for i in range(0, 14, 2)])
    ink = (rows[:, None] >> np.arange(4, -1, -1)) & 1                         # (7,5)
    return ink[:, ink.any(0)].astype(np.uint8)


def draw_scene(rng, size, held_out=False):
    """One picture, uint8 (size,size,3); all randomness from `rng`.

    held_out: signs of two words show only pairs that other pictures never show.
    """
    scene = Scene(rng, size, held_out)
    _sky(scene)
    if rng.random() < 0.7:
        _street_from_the_front(scene)
    else:
        _street_along(scene)
    return np.array(scene.image)                                              # (size,size,3)


class Scene:
    """A canvas in 64ths of the picture, its light, its words, and the boards that hang already."""

    def __init__(self, rng, size, held_out):
        self.rng, self.size, self.held_out = rng, size, held_out
        self.unit = size / 64
        self.letter = max(1, round(self.unit))
        self.image = Image.new("RGB", (size, size))
        self.draw = ImageDraw.Draw(self.image)
        self.boards = []
        self.night = rng.random() < 0.1
        self.sky = NIGHT_SKY if self.night else self.pick(SKIES)
        self.light = 0.5 if self.night else rng.uniform(0.88, 1.06)

    def pick(self, options):
        return options[self.rng.integers(len(options))]

    def lit(self, colour):
        return shade(colour, self.light)

    def box(self, x0, y0, x1, y1, colour):
        """A filled rectangle, x1 and y1 excluded; at least one pixel wide and high."""
        x0, y0, x1, y1 = (round(v * self.unit) for v in (x0, y0, x1, y1))
        self.draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), fill=colour)

    def shape(self, points, colour):
        self.draw.polygon([(x * self.unit, y * self.unit) for x, y in points], fill=colour)

    def disc(self, x, y, rx, ry, colour):
        u = self.unit
        self.draw.ellipse(((x - rx) * u, (y - ry) * u, (x + rx) * u, (y + ry) * u), fill=colour)

    def wall_colour(self):
        return shade(self.pick(WALLS), self.light * self.rng.uniform(0.9, 1.08))

    def glass(self):
        """A window: lit at night, now and then; by day a reflection of the sky."""
        if self.night and self.rng.random() < 0.55:
            return (252, 220, 130)
        return shade(self.sky[0], self.rng.uniform(0.3, 0.62) if not self.night else 0.8)


def _sky(scene):
    top, bottom = (np.array(colour) for colour in scene.sky)
    ramp = np.linspace(0, 1, scene.size)[:, None]
    rows = (top + (bottom - top) * ramp ** 0.8).astype(np.uint8)[:, None]     # (size,1,3)
    scene.image.paste(Image.fromarray(rows).resize((scene.size, scene.size)))
    rng = scene.rng
    if rng.random() < 0.4:
        x, y, r = rng.uniform(6, 58), rng.uniform(4, 14), rng.uniform(2.5, 4)
        scene.disc(x, y, r, r, (252, 248, 224) if scene.night else (255, 244, 190))
    for _ in range(rng.integers(0, 3)):
        x, y, r = rng.uniform(0, 64), rng.uniform(3, 18), rng.uniform(3, 6)
        cloud = shade(scene.sky[1], 0.8 if scene.night else 1.12)
        for dx, dy, f in ((-1.1, 0.3, 0.7), (0, 0, 1), (1.2, 0.25, 0.75)):
            scene.disc(x + dx * r, y + dy * r * 0.5, f * r, f * r * 0.5, cloud)


# -- a street seen from the front ------------------------------------------------------------------

def _street_from_the_front(scene):
    rng = scene.rng
    ground = rng.uniform(49, 54)
    _skyline(scene, ground)
    lines = _words(scene, pair_share=0.45)
    board_width = max(word_mask(line, scene.letter).width for line in lines) / scene.unit + 6
    width = min(62, board_width + rng.uniform(2, 8))
    left = rng.uniform(1, 63 - width)
    _facade(scene, left, left + width, rng.uniform(2, 14), ground, shop=True)
    neighbours = _neighbours(scene, left, left + width, ground)
    _road_from_the_front(scene, ground)
    _board(scene, left + width / 2, ground - (14 if len(lines) == 1 else 18.5), lines)
    for x0, x1 in neighbours:
        if rng.random() < 0.75:
            _blade(scene, (max(x0, 0) + min(x1, 64)) / 2, rng.uniform(6, 12), ground - 3)
    if rng.random() < 0.5:
        _post(scene, rng.uniform(8, 56), ground + 4)
    _furniture(scene, ground)


def _skyline(scene, ground):
    haze = shade(np.add(scene.sky[0], scene.sky[1]) / 2, 0.82)
    x = 0.0
    while x < 64:
        width = scene.rng.uniform(4, 12)
        scene.box(x, scene.rng.uniform(16, 30), x + width, ground, haze)
        x += width


def _neighbours(scene, left, right, ground):
    """Facades to both sides until the picture ends; returns where they stand."""
    places = []
    for edge, step in ((left, -1), (right, 1)):
        while 0 < edge < 64:
            far = edge + step * scene.rng.uniform(13, 24)
            if scene.rng.random() < 0.15 and 8 < edge < 56:
                edge += step * 4  # a gap shows the skyline
                continue
            x0, x1 = min(edge, far), max(edge, far)
            _facade(scene, x0, x1, scene.rng.uniform(4, 24), ground, shop=False)
            places.append((x0, x1))
            edge = far
    return places


def _facade(scene, x0, x1, top, ground, shop):
    rng, wall = scene.rng, scene.wall_colour()
    roof = shade(wall, rng.choice((0.6, 0.75, 1.2)))
    style = rng.integers(3)
    if style == 0 and not shop:
        scene.shape(((x0 - 0.5, top), ((x0 + x1) / 2, top - rng.uniform(4, 8)), (x1 + 0.5, top)),
                    scene.lit((126, 62, 48)))
    elif style == 1:
        scene.shape(((x0, top), (x0 + 2, top - 4), (x1 - 2, top - 4), (x1, top)),
                    scene.lit((84, 88, 100)))
    scene.box(x0, top, x1, ground, wall)
    scene.box(x1 - 1, top, x1, ground, shade(wall, 0.78))
    scene.box(x0 - 0.5, top, x1 + 0.5, top + 1.5, roof)
    storefront = ground - (10 if shop else 9)
    _windows(scene, x0 + 1, x1 - 2, top + 3.5, storefront - (10 if shop else 1), wall)
    if shop:
        _shop_front(scene, x0, x1, storefront, ground)
    else:
        _door(scene, x0 + rng.uniform(2, max(2.5, x1 - x0 - 7)), ground, shade(wall, 1.25))


def _windows(scene, x0, x1, y0, y1, wall):
    """A grid of equal windows that fills the wall evenly."""
    rng = scene.rng
    width, height = rng.uniform(3, 4.5), rng.uniform(4, 6.5)
    columns, rows = int((x1 - x0) / (width + 2.2)), int((y1 - y0) / (height + 2.5))
    if columns < 1 or rows < 1:
        return
    gap_x, gap_y = (x1 - x0) / columns, (y1 - y0) / rows
    frame = shade(wall, 1.3 if sum(wall) < 480 else 0.72)
    glass = scene.glass()
    for column in range(columns):
        for row in range(rows):
            x, y = x0 + gap_x * column + (gap_x - width) / 2, y0 + gap_y * row
            pane = scene.glass() if scene.night or rng.random() < 0.2 else glass
            scene.box(x, y, x + width, y + height, frame)
            scene.box(x + 1, y + 1, x + width - 1, y + height - 1, pane)
            scene.box(x - 0.5, y + height, x + width + 0.5, y + height + 1, shade(wall, 0.7))


def _shop_front(scene, x0, x1, top, ground):
    """Glass from side to side, a door, and sometimes a striped awning."""
    rng = scene.rng
    frame = scene.lit(scene.pick(((60, 44, 36), (40, 60, 58), (70, 30, 34), (48, 52, 70))))
    scene.box(x0, top, x1, ground, frame)
    glow = (250, 214, 140) if scene.night else shade(scene.sky[1], 0.78)
    door = rng.uniform(x0 + 2, x1 - 8)
    for a, b in ((x0 + 1.5, door - 1), (door + 7, x1 - 1.5)):
        if b - a > 3:
            scene.box(a, top + 2, b, ground - 2, glow)
            scene.shape(((a + 1, ground - 3), (a + 3, top + 3), (a + 4.5, top + 3),
                         (a + 2.5, ground - 3)), shade(glow, 1.12))
    _door(scene, door, ground, frame)
    if rng.random() < 0.5:
        colours = scene.lit(scene.pick(BOARDS)[0]), scene.lit((244, 240, 230))
        for i in range(int((x1 - x0) / 3)):
            x = x0 + 3 * i
            scene.box(x, top - 1, x + 3, top + 2, colours[i % 2])


def _door(scene, x, ground, frame):
    leaf = scene.lit(scene.pick(DOORS))
    scene.box(x, ground - 9, x + 6, ground, frame)
    scene.box(x + 1, ground - 8, x + 5, ground, leaf)
    scene.box(x + 2, ground - 7, x + 4, ground - 5, scene.glass())


def _road_from_the_front(scene, ground):
    """Pavement with joints that run to a vanishing point, kerb, and road with dashes."""
    stone, tar = scene.lit((186, 180, 172)), scene.lit((88, 90, 98))
    scene.box(0, ground, 64, 64, stone)
    vanish = scene.rng.uniform(16, 48)
    for i in range(-9, 10):
        x = vanish + i * 8
        scene.draw.line([(x * scene.unit, ground * scene.unit),
                         ((vanish + i * 9.6) * scene.unit, (ground + 4) * scene.unit)],
                        fill=shade(stone, 0.84), width=scene.letter)
    scene.box(0, ground + 4, 64, ground + 5, shade(stone, 1.18))
    scene.box(0, ground + 5, 64, 64, tar)
    if ground < 53:
        offset = scene.rng.uniform(0, 14)
        for i in range(-1, 6):
            x = offset + i * 14
            scene.shape(((x, 60.6), (x + 7, 60.6), (x + 7.6, 61.6), (x - 0.6, 61.6)),
                        scene.lit((226, 222, 206)))


# -- a street seen along ---------------------------------------------------------------------------

def _street_along(scene):
    rng = scene.rng
    vanish = rng.uniform(22, 42), rng.uniform(26, 33)
    _skyline(scene, vanish[1] + 2)
    _road_along(scene, vanish)
    for side in (-1, 1):
        _wall_along(scene, vanish, side)
    lines = _words(scene, pair_share=0.3)
    y = rng.uniform(8, 20)
    scene.box(0, y, 64, y + 1, scene.lit((60, 60, 66)))  # the rope of a banner across the street
    _board(scene, rng.uniform(26, 38), y + 4, lines)
    for x in (rng.uniform(3, 8), rng.uniform(56, 61)):
        if rng.random() < 0.8:
            _blade(scene, x, rng.uniform(8, 24), 56)


def _road_along(scene, vanish):
    x, y = vanish
    tar, stone = scene.lit((92, 94, 102)), scene.lit((182, 176, 168))
    scene.box(0, y, 64, 64, stone)
    scene.shape(((x, y), (2, 64), (62, 64)), tar)
    paint = scene.lit((230, 226, 210))
    for near in (1.0, 1.35, 1.9, 2.9, 5.0):
        a, b = 34 / near, 34 / (near * 1.17)
        scene.shape(((x - a / 34, y + a), (x + a / 34, y + a),
                     (x + b / 34, y + b), (x - b / 34, y + b)), paint)


def _wall_along(scene, vanish, side):
    """Four houses that shrink towards the vanishing point; `side` -1 is left, 1 right."""
    rng, (x, y) = scene.rng, vanish
    reach = (0 if side < 0 else 64) - x
    houses, near = [], 1.0
    while near < 5:
        houses.append((near, near * rng.uniform(1.35, 1.6), rng.uniform(26, 44)))
        near = houses[-1][1]

    def patch(near, far, top, bottom, colour):
        """A rectangle on the wall: depths from `near` to `far`, heights measured at depth 1."""
        scene.shape([(x + reach / depth, y + height / depth)
                     for depth, height in ((near, top), (far, top), (far, bottom), (near, bottom))],
                    colour)

    for near, far, height in reversed(houses):
        wall, length = shade(scene.wall_colour(), 0.86 if side < 0 else 1), far - near
        patch(near, far, -height, 25, wall)
        patch(near, far, -height, 1.5 - height, shade(wall, 0.7))
        for level in range(int((height + 12) / 10)):
            for left in (0.12, 0.42, 0.72):
                patch(near + left * length, near + (left + 0.16) * length,
                      2.5 - 10 * level, 8 - 10 * level, scene.glass())
        patch(near + 0.35 * length, near + 0.65 * length, 13, 25, scene.lit((70, 48, 40)))


# -- signs -----------------------------------------------------------------------------------------

@lru_cache
def _sign_texts(scale, width, held_out):
    """(texts of one word, texts of two) that fit into `width` px; the pairs differ where held
    out."""
    def fitting(words):
        return [word for word in words if word_mask(word, scale).width <= width]

    pairs = [(first, last) for first in fitting(FIRST_WORDS) for last in fitting(LAST_WORDS)
             if is_held_out(first, last) == held_out]
    return [(word,) for word in fitting(LAST_WORDS + SHORT_WORDS)], pairs


def is_held_out(first, last):
    """Every fifth pair of words appears in held-out pictures only."""
    return (FIRST_WORDS.index(first) + LAST_WORDS.index(last)) % 5 == 0


def _words(scene, pair_share):
    """The words of the main sign: one line, or two with probability `pair_share`."""
    room = int(0.95 * scene.size) - 6 * scene.letter
    single, pairs = _sign_texts(scene.letter, room, scene.held_out)
    return scene.pick(pairs if scene.rng.random() < pair_share else single)


def _board(scene, x, y, lines):
    """A board centred at x, y (64ths) with its words; returns what `_hang` does."""
    scale = scene.letter
    if len(lines) == 1 and scene.rng.random() < 0.3:
        double = word_mask(lines[0], 2 * scale)
        scale *= 2 if double.width + 4 * scale < 0.9 * scene.size else 1
    inks = [word_mask(line, scale) for line in lines]
    return _hang(scene, x, y, inks, scene.pick(BOARDS))


def _blade(scene, x, top, bottom):
    """A narrow upright board on a facade."""
    words = [w for w in LAST_WORDS + SHORT_WORDS
             if " " not in w and (9 * len(w) + 2) * scene.letter < (bottom - top) * scene.unit]
    if words:
        ink = word_mask(scene.pick(words), scene.letter, upright=True)
        _hang(scene, x, top + ink.height / scene.unit / 2 + 2, [ink], scene.pick(BOARDS))


def _post(scene, x, foot):
    """A board on a post that stands on the pavement."""
    word = scene.pick([word for word in SHORT_WORDS if len(word) < 6])
    box = _board(scene, x, foot - scene.rng.uniform(15, 20), (word,))
    if box:
        middle = (box[0] + box[2]) / 2 / scene.unit
        scene.box(middle - 0.5, box[3] / scene.unit, middle + 0.5, foot, scene.lit((150, 154, 160)))


def _hang(scene, x, y, inks, colours):
    """Paste lines of ink on a framed board, in whole pixels.

    Returns its (x0, y0, x1, y1); None where it does not fit, touches another or would be a fourth.
    """
    ground, ink_colour = colours
    pad = 2 * scene.letter
    width = max(ink.width for ink in inks) + 2 * pad + 2 * scene.letter
    height = sum(ink.height for ink in inks) + pad * (len(inks) + 1)
    left = max(0, min(round(x * scene.unit - width / 2), scene.size - width))
    top = max(0, min(round(y * scene.unit - height / 2), scene.size - height))
    right, bottom = left + width, top + height
    touching = any(left <= x1 and x0 <= right and top <= y1 and y0 <= bottom
                   for x0, y0, x1, y1 in scene.boards)
    if touching or max(right, bottom) > scene.size or len(scene.boards) == 3:
        return None
    scene.boards.append((left, top, right, bottom))
    scene.draw.rectangle((left, top, right - 1, bottom - 1), fill=ground,
                         outline=shade(ground, 0.7), width=scene.letter)
    y = top + pad
    for ink in inks:
        scene.image.paste(ink_colour, (left + (width - ink.width) // 2, y), ink)
        y += ink.height + pad
    return scene.boards[-1]


def _furniture(scene, ground):
    """A tree or a lamp where no board hangs."""
    rng = scene.rng
    x = rng.uniform(4, 60)
    left, right = (x - 6) * scene.unit, (x + 6) * scene.unit
    if any(x0 < right and left < x1 for x0, _, x1, _ in scene.boards):
        return
    if rng.random() < 0.6:
        leaf = scene.lit((66, 124, 62))
        scene.box(x - 0.5, ground - 8, x + 1, ground + 3, scene.lit((88, 62, 44)))
        scene.disc(x, ground - 12, 5, 6, leaf)
        scene.disc(x - 1.5, ground - 14, 2.5, 3, shade(leaf, 1.25))
    else:
        scene.box(x, ground - 20, x + 1, ground + 3, scene.lit((50, 54, 60)))
        scene.disc(x + 0.5, ground - 21, 1.6, 1.6, (255, 236, 170))
