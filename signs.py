"""Draw street scenes with signs from a seed: the images of `data.Signs`.

They show what AVQ's Figure 1 shows. A plain VQGAN keeps the sky, the houses and the road, but loses
the letters, whose strokes are one pixel wide at 64 px. Lengths are in 64ths of the image's side.
The letters are drawn here and not by a font, so that they are the same on every machine.

    rng -> sky -> street from the front or along it -> boards with words -> uint8 (size,size,3)
"""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

# A letter is seven rows of five bits, from the top, in two hexadecimal digits each: "04" is ..#..
# Columns without ink are cut.
GLYPHS = {
    "A": "0E11111F111111", "B": "1E11111E11111E", "C": "0E11101010110E", "D": "1E11111111111E",
    "E": "1F10101E10101F", "F": "1F10101E101010", "G": "0E11101711110F", "H": "1111111F111111",
    "I": "07020202020207", "J": "0702020202120C", "K": "11121418141211", "L": "1010101010101F",
    "M": "111B1515111111", "N": "11111915131111", "O": "0E11111111110E", "P": "1E11111E101010",
    "Q": "0E11111115120D", "R": "1E11111E141211", "S": "0F10100E01011E", "T": "1F040404040404",
    "U": "1111111111110E", "V": "11111111110A04", "W": "1111111515150A", "X": "11110A040A1111",
    "Y": "11110A04040404", "Z": "1F01020408101F", " ": "00000000000000",
}
FIRST_WORDS, LAST_WORDS, SHORT_WORDS = (words.split(",") for words in (
    "OLD,NEW,BIG,CITY,BLUE,GRAND,ROYAL,GREEN,NORTH,LITTLE,HARBOR,GOLDEN,RED,PARK,UNION,QUICK,CORNER,"
    "LUCKY,HAPPY",
    "CAFE,HOTEL,BAKERY,MARKET,BOOKS,PIZZA,SHOES,FLORIST,CINEMA,BANK,BAR,MUSEUM,TAILOR,THEATER,"
    "DINER,GRILL,KIOSK,TOYS,GALLERY,JAZZ,WINE,FISH,TEA",
    "STOP,OPEN,TAXI,EXIT,SALE,BUS,ZOO,INN,ONE WAY,SLOW,SHOP,METRO,PARKING,CLOSED,MUSIC,QUAY,VIEW,"
    "BIKES,JUICE,LUNCH"))

# Colours of the upper and lower end of a sky, of the ground and ink of a board.
SKIES = (((84, 140, 208), (200, 226, 242)), ((120, 168, 206), (250, 228, 196)),
         ((150, 160, 174), (220, 224, 226)), ((92, 78, 130), (248, 180, 126)),
         ((60, 120, 190), (170, 208, 236)))
NIGHT_SKY = (22, 28, 62), (88, 84, 136)
WALLS = ((164, 88, 68), (226, 208, 170), (206, 158, 88), (152, 152, 156), (106, 126, 150),
         (206, 144, 132), (144, 162, 132), (232, 228, 218), (122, 66, 58), (96, 142, 146))
DOORS = ((120, 50, 40), (40, 84, 72), (52, 62, 110), (92, 64, 40), (36, 36, 40))
SHOP_FRAMES = ((60, 44, 36), (40, 60, 58), (70, 30, 34), (48, 52, 70))
BOARDS = (((196, 30, 36), (255, 255, 255)), ((22, 40, 96), (255, 255, 255)),
          ((18, 78, 52), (252, 244, 214)), ((24, 24, 26), (250, 208, 84)),
          ((250, 250, 246), (190, 24, 32)), ((252, 212, 40), (20, 20, 20)),
          ((16, 110, 120), (255, 255, 255)), ((250, 240, 214), (70, 36, 20)),
          ((250, 250, 250), (18, 44, 120)), ((110, 20, 44), (255, 226, 130)),
          ((232, 112, 28), (255, 255, 255)), ((30, 30, 40), (120, 240, 220)))


def shade(colour, factor):
    """Multiply `colour` by `factor`, at most 255 in each channel."""
    return tuple(min(255, round(channel * factor)) for channel in colour)


def draw_scene(rng, size, held_out=False):
    """Draw one image: uint8 (size,size,3). Held-out ones have other pairs of words."""
    scene = Scene(rng, size, held_out)
    # Fill the sky from its upper to its lower colour; add a sun or moon, and clouds.
    top, bottom = (np.array(colour) for colour in scene.sky)
    ramp = np.linspace(0, 1, size)[:, None]
    rows = (top + (bottom - top) * ramp ** 0.8).astype(np.uint8)[:, None]     # (size,1,3)
    scene.image.paste(Image.fromarray(rows).resize((size, size)))
    if rng.random() < 0.4:
        x, y, r = rng.uniform(6, 58), rng.uniform(4, 14), rng.uniform(2.5, 4)
        scene.disc(x, y, r, r, (252, 248, 224) if scene.night else (255, 244, 190))
    for _ in range(rng.integers(0, 3)):
        x, y, r = rng.uniform(0, 64), rng.uniform(3, 18), rng.uniform(3, 6)
        cloud = shade(scene.sky[1], 0.8 if scene.night else 1.12)
        for dx, dy, f in ((-1.1, 0.3, 0.7), (0, 0, 1), (1.2, 0.25, 0.75)):
            scene.disc(x + dx * r, y + dy * r * 0.5, f * r, f * r * 0.5, cloud)
    street = _street_from_the_front if rng.random() < 0.7 else _street_along
    street(scene)
    return np.array(scene.image)                                              # (size,size,3)


class Scene:
    """Hold the image, its light and the boards drawn so far; lengths are in 64ths of its side."""

    def __init__(self, rng, size, held_out):
        self.rng, self.size, self.unit, self.held_out = rng, size, size / 64, held_out
        self.letter = max(1, round(self.unit))           # px: the width of a stroke
        self.image = Image.new("RGB", (size, size))
        self.draw = ImageDraw.Draw(self.image)
        self.boards = []                                 # of (x0, y0, x1, y1) in px
        self.night = rng.random() < 0.1
        self.sky = NIGHT_SKY if self.night else self.pick(SKIES)
        self.light = 0.5 if self.night else rng.uniform(0.88, 1.06)

    def pick(self, options):
        return options[self.rng.integers(len(options))]

    def lit(self, colour):
        return shade(colour, self.light)

    def wall(self):
        return shade(self.pick(WALLS), self.light * self.rng.uniform(0.9, 1.08))

    def glass(self):
        """Choose a window's colour: some are lit at night, the others reflect the sky."""
        if self.night and self.rng.random() < 0.55:
            return (252, 220, 130)
        return shade(self.sky[0], 0.8 if self.night else self.rng.uniform(0.3, 0.62))

    def box(self, x0, y0, x1, y1, colour):
        """Fill a rectangle without x1 and y1, at least one pixel wide and high."""
        x0, y0, x1, y1 = (round(v * self.unit) for v in (x0, y0, x1, y1))
        self.draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), fill=colour)

    def shape(self, points, colour):
        self.draw.polygon([(x * self.unit, y * self.unit) for x, y in points], fill=colour)

    def disc(self, x, y, rx, ry, colour):
        self.draw.ellipse([v * self.unit for v in (x - rx, y - ry, x + rx, y + ry)], fill=colour)


def _street_from_the_front(scene):
    """Draw a shop with its sign between other houses, and the road in front."""
    rng, ground = scene.rng, scene.rng.uniform(49, 54)
    _skyline(scene, ground)
    # Build a shop as wide as its words need, and houses on both sides up to the image's edges.
    lines = _words(scene, pair_share=0.45)
    board_width = max(word_mask(line, scene.letter).width for line in lines) / scene.unit + 6
    width = min(62, board_width + rng.uniform(2, 8))
    left = rng.uniform(1, 63 - width)
    _house(scene, left, left + width, rng.uniform(2, 14), ground, shop=True)
    neighbours = []
    for edge, step in ((left, -1), (left + width, 1)):
        while 0 < edge < 64:
            far = edge + step * rng.uniform(13, 24)
            if rng.random() < 0.15 and 8 < edge < 56:
                edge += step * 4                         # a gap shows the skyline
                continue
            neighbours.append((min(edge, far), max(edge, far)))
            _house(scene, *neighbours[-1], rng.uniform(4, 24), ground, shop=False)
            edge = far
    # Pave the ground with joints that run to a vanishing point, then draw the kerb and the road.
    stone = scene.lit((186, 180, 172))
    scene.box(0, ground, 64, 64, stone)
    vanish = rng.uniform(16, 48)
    for i in range(-9, 10):
        joint = (vanish + i * 8, ground), (vanish + i * 9.6, ground + 4)
        scene.draw.line([(x * scene.unit, y * scene.unit) for x, y in joint],
                        fill=shade(stone, 0.84), width=scene.letter)
    scene.box(0, ground + 4, 64, ground + 5, shade(stone, 1.18))
    scene.box(0, ground + 5, 64, 64, scene.lit((88, 90, 98)))
    if ground < 53:
        for x in rng.uniform(0, 14) + 14 * np.arange(-1, 6):
            scene.shape(((x, 60.6), (x + 7, 60.6), (x + 7.6, 61.6), (x - 0.6, 61.6)),
                        scene.lit((226, 222, 206)))
    # Hang the shop's board, blades on the other houses, and a board on a post.
    _board(scene, left + width / 2, ground - (14 if len(lines) == 1 else 18.5), lines)
    for x0, x1 in neighbours:
        if rng.random() < 0.75:
            _blade(scene, (max(x0, 0) + min(x1, 64)) / 2, rng.uniform(6, 12), ground - 3)
    if rng.random() < 0.5:
        x, foot = rng.uniform(8, 56), ground + 4
        word = scene.pick([word for word in SHORT_WORDS if len(word) < 6])
        if board := _board(scene, x, foot - rng.uniform(15, 20), (word,)):
            x = (board[0] + board[2]) / 2 / scene.unit
            scene.box(x - 0.5, board[3] / scene.unit, x + 0.5, foot, scene.lit((150, 154, 160)))
    # Plant a tree or a lamp where no board hangs.
    x = rng.uniform(4, 60)
    if any(x0 < (x + 6) * scene.unit and (x - 6) * scene.unit < x1
           for x0, _, x1, _ in scene.boards):
        return
    if rng.random() < 0.6:
        leaf = scene.lit((66, 124, 62))
        scene.box(x - 0.5, ground - 8, x + 1, ground + 3, scene.lit((88, 62, 44)))
        scene.disc(x, ground - 12, 5, 6, leaf)
        scene.disc(x - 1.5, ground - 14, 2.5, 3, shade(leaf, 1.25))
    else:
        scene.box(x, ground - 20, x + 1, ground + 3, scene.lit((50, 54, 60)))
        scene.disc(x + 0.5, ground - 21, 1.6, 1.6, (255, 236, 170))


def _skyline(scene, ground):
    haze, x = shade(np.add(scene.sky[0], scene.sky[1]) / 2, 0.82), 0.0
    while x < 64:
        width = scene.rng.uniform(4, 12)
        scene.box(x, scene.rng.uniform(16, 30), x + width, ground, haze)
        x += width


def _house(scene, x0, x1, top, ground, shop):
    """Draw a house from x0 to x1: roof, wall, windows, then a shop's front or a door."""
    rng, wall = scene.rng, scene.wall()
    cornice = shade(wall, rng.choice((0.6, 0.75, 1.2)))
    roof = rng.integers(3)
    if roof == 0 and not shop:
        scene.shape(((x0 - 0.5, top), ((x0 + x1) / 2, top - rng.uniform(4, 8)), (x1 + 0.5, top)),
                    scene.lit((126, 62, 48)))
    elif roof == 1:
        scene.shape(((x0, top), (x0 + 2, top - 4), (x1 - 2, top - 4), (x1, top)),
                    scene.lit((84, 88, 100)))
    scene.box(x0, top, x1, ground, wall)
    scene.box(x1 - 1, top, x1, ground, shade(wall, 0.78))
    scene.box(x0 - 0.5, top, x1 + 0.5, top + 1.5, cornice)
    # Fill the wall evenly with a grid of equal windows.
    left, right, upper, lower = x0 + 1, x1 - 2, top + 3.5, ground - (20 if shop else 10)
    width, height = rng.uniform(3, 4.5), rng.uniform(4, 6.5)
    columns, rows = int((right - left) / (width + 2.2)), int((lower - upper) / (height + 2.5))
    if columns > 0 and rows > 0:
        across, down = (right - left) / columns, (lower - upper) / rows
        frame, common = shade(wall, 1.3 if sum(wall) < 480 else 0.72), scene.glass()
        for x in left + across * np.arange(columns) + (across - width) / 2:
            for y in upper + down * np.arange(rows):
                pane = scene.glass() if scene.night or rng.random() < 0.2 else common
                scene.box(x, y, x + width, y + height, frame)
                scene.box(x + 1, y + 1, x + width - 1, y + height - 1, pane)
                scene.box(x - 0.5, y + height, x + width + 0.5, y + height + 1, shade(wall, 0.7))
    # Glaze the shop from side to side; add the door, and sometimes a striped awning over the shop.
    if shop:
        frame, top = scene.lit(scene.pick(SHOP_FRAMES)), ground - 10
        glow = (250, 214, 140) if scene.night else shade(scene.sky[1], 0.78)
        door = rng.uniform(x0 + 2, x1 - 8)
        scene.box(x0, top, x1, ground, frame)
        for a, b in ((x0 + 1.5, door - 1), (door + 7, x1 - 1.5)):
            if b - a > 3:
                scene.box(a, top + 2, b, ground - 2, glow)
                scene.shape(((a + 1, ground - 3), (a + 3, top + 3), (a + 4.5, top + 3),
                             (a + 2.5, ground - 3)), shade(glow, 1.12))
    else:
        door, frame = x0 + rng.uniform(2, max(2.5, x1 - x0 - 7)), shade(wall, 1.25)
    scene.box(door, ground - 9, door + 6, ground, frame)
    scene.box(door + 1, ground - 8, door + 5, ground, scene.lit(scene.pick(DOORS)))
    scene.box(door + 2, ground - 7, door + 4, ground - 5, scene.glass())
    if shop and rng.random() < 0.5:
        stripes = scene.lit(scene.pick(BOARDS)[0]), scene.lit((244, 240, 230))
        for i in range(int((x1 - x0) / 3)):
            scene.box(x0 + 3 * i, top - 1, x0 + 3 * i + 3, top + 2, stripes[i % 2])


def _street_along(scene):
    """Draw a road to a vanishing point between two rows of houses, under a banner."""
    rng = scene.rng
    x, y = vanish = rng.uniform(22, 42), rng.uniform(26, 33)

    def patch(edge, near, far, top, bottom, colour):
        """Fill a wall from depth `near` to `far`. At depth 1 it is at x = `edge`."""
        corners = (near, top), (far, top), (far, bottom), (near, bottom)
        scene.shape([(x + (edge - x) / depth, y + h / depth) for depth, h in corners], colour)
    _skyline(scene, y + 2)
    # Lay the road, and dashes on it that shrink with their depth.
    scene.box(0, y, 64, 64, scene.lit((182, 176, 168)))
    scene.shape((vanish, (2, 64), (62, 64)), scene.lit((92, 94, 102)))
    for near in (1.0, 1.35, 1.9, 2.9, 5.0):
        a, b = 34 / near, 34 / (near * 1.17)
        scene.shape(((x - a / 34, y + a), (x + a / 34, y + a),
                     (x + b / 34, y + b), (x - b / 34, y + b)), scene.lit((230, 226, 210)))
    # Build the houses of each side, from the farthest to the nearest.
    for edge, sunlight in ((0, 0.86), (64, 1)):
        houses, near = [], 1.0
        while near < 5:
            houses.append((near, near * rng.uniform(1.35, 1.6), rng.uniform(26, 44)))
            near = houses[-1][1]
        for near, far, height in reversed(houses):
            wall, length = shade(scene.wall(), sunlight), far - near
            patch(edge, near, far, -height, 25, wall)
            patch(edge, near, far, -height, 1.5 - height, shade(wall, 0.7))
            for level in range(int((height + 12) / 10)):
                for left in (0.12, 0.42, 0.72):
                    patch(edge, near + left * length, near + (left + 0.16) * length,
                          2.5 - 10 * level, 8 - 10 * level, scene.glass())
            patch(edge, near + 0.35 * length, near + 0.65 * length, 13, 25, scene.lit((70, 48, 40)))
    # Hang a banner on a rope across the street, and blades on the walls.
    lines, rope = _words(scene, pair_share=0.3), rng.uniform(8, 20)
    scene.box(0, rope, 64, rope + 1, scene.lit((60, 60, 66)))
    _board(scene, rng.uniform(26, 38), rope + 4, lines)
    for x in (rng.uniform(3, 8), rng.uniform(56, 61)):
        if rng.random() < 0.8:
            _blade(scene, x, rng.uniform(8, 24), 56)


@lru_cache(maxsize=4096)
def word_mask(text, scale, upright=False):
    """Draw `text` as a mask, Pillow "L", 7·scale px high. `upright` stacks the letters."""
    letters = []
    for letter in text:
        rows = np.array([*bytes.fromhex(GLYPHS[letter])], np.uint8)
        ink = np.unpackbits(rows[:, None], axis=1)                            # (7,8)
        letters.append(ink[:, ink.any(0)] if letter != " " else ink[:, :3])
    if upright:                                          # each in the middle of five columns
        sides = [((5 - a.shape[1]) // 2, (6 - a.shape[1]) // 2) for a in letters]
        ink = np.concatenate([np.pad(a, ((0, 2), side)) for a, side in zip(letters, sides)])[:-2]
    else:
        ink = np.concatenate([np.pad(a, ((0, 0), (0, 1))) for a in letters], 1)[:, :-1]
    mask = Image.fromarray(ink * np.uint8(255))
    # Enlarge smoothly and make the edges steep again, which gives round strokes and no stairs.
    mask = mask.resize((mask.width * scale, mask.height * scale), Image.Resampling.BICUBIC)
    return mask.point([min(255, max(0, (v - 128) * scale + 128)) for v in range(256)])


@lru_cache
def _sign_texts(scale, room, held_out):
    """List the words and the pairs that fit `room` px. Every fifth pair is a held-out one."""
    first, last, short = ([word for word in words if word_mask(word, scale).width <= room]
                          for words in (FIRST_WORDS, LAST_WORDS, SHORT_WORDS))
    pairs = [(a, b) for a in first for b in last
             if held_out == ((FIRST_WORDS.index(a) + LAST_WORDS.index(b)) % 5 == 0)]
    return [(word,) for word in last + short], pairs


def _words(scene, pair_share):
    """Choose the main sign's words: one line, or two with probability `pair_share`."""
    single, pairs = _sign_texts(scene.letter, int(0.95 * scene.size) - 6 * scene.letter,
                                scene.held_out)
    return scene.pick(pairs if scene.rng.random() < pair_share else single)


def _board(scene, x, y, lines):
    """Hang a board of these lines, centred at x, y. A single line may have double size."""
    scale = scene.letter
    if len(lines) == 1 and scene.rng.random() < 0.3:
        wide = word_mask(lines[0], 2 * scale).width + 4 * scale
        scale = 2 * scale if wide < 0.9 * scene.size else scale
    return _hang(scene, x, y, [word_mask(line, scale) for line in lines])


def _blade(scene, x, top, bottom):
    """Hang a narrow upright board on a house."""
    words = [w for w in LAST_WORDS + SHORT_WORDS
             if " " not in w and (9 * len(w) + 2) * scene.letter < (bottom - top) * scene.unit]
    if words:
        ink = word_mask(scene.pick(words), scene.letter, upright=True)
        _hang(scene, x, top + ink.height / scene.unit / 2 + 2, [ink])


def _hang(scene, x, y, inks):
    """Paste lines of ink on a framed board, in whole pixels: its (x0, y0, x1, y1) in px.

    Returns None and draws nothing if it does not fit, touches another board or would be the fourth.
    """
    (ground, ink_colour), pad = scene.pick(BOARDS), 2 * scene.letter
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
    return left, top, right, bottom
