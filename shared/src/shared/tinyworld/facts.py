"""Facts of the world: the fifty states of the USA with their capitals and cities, and antonyms in five languages.

Every city stands under the state that its bare name means first; names shared by two large cities (Portland, Columbia,
Kansas City, Springfield and the like) are left out, and so are capitals, so that a city never names its own answer.
"""

# state: (capital, other cities)
STATES: dict[str, tuple[str, tuple[str, ...]]] = {
    "Alabama": ("Montgomery", ("Birmingham", "Mobile", "Tuscaloosa", "Huntsville")),
    "Alaska": ("Juneau", ("Anchorage", "Fairbanks", "Sitka", "Ketchikan")),
    "Arizona": ("Phoenix", ("Tucson", "Mesa", "Scottsdale", "Flagstaff")),
    "Arkansas": ("Little Rock", ("Conway", "Jonesboro", "Texarkana", "Bentonville")),
    "California": ("Sacramento", ("Fresno", "Oakland", "Anaheim", "Bakersfield")),
    "Colorado": ("Denver", ("Boulder", "Pueblo", "Durango", "Loveland")),
    "Connecticut": ("Hartford", ("Bridgeport", "Stamford", "Waterbury", "Norwalk")),
    "Delaware": ("Dover", ("Wilmington", "Rehoboth", "Lewes", "Seaford")),
    "Florida": ("Tallahassee", ("Miami", "Tampa", "Orlando", "Pensacola")),
    "Georgia": ("Atlanta", ("Savannah", "Macon", "Valdosta", "Marietta")),
    "Hawaii": ("Honolulu", ("Hilo", "Kailua", "Lahaina", "Waipahu")),
    "Idaho": ("Boise", ("Nampa", "Pocatello", "Caldwell", "Rexburg")),
    "Illinois": ("Springfield", ("Chicago", "Peoria", "Rockford", "Joliet")),
    "Indiana": ("Indianapolis", ("Evansville", "Muncie", "Gary", "Kokomo")),
    "Iowa": ("Des Moines", ("Dubuque", "Davenport", "Waterloo", "Ames")),
    "Kansas": ("Topeka", ("Wichita", "Lawrence", "Salina", "Olathe")),
    "Kentucky": ("Frankfort", ("Louisville", "Lexington", "Paducah", "Owensboro")),
    "Louisiana": ("Baton Rouge", ("Shreveport", "Lafayette", "Houma", "Metairie")),
    "Maine": ("Augusta", ("Bangor", "Biddeford", "Kennebunk", "Ellsworth")),
    "Maryland": ("Annapolis", ("Baltimore", "Frederick", "Rockville", "Bethesda")),
    "Massachusetts": ("Boston", ("Worcester", "Lowell", "Cambridge", "Brockton")),
    "Michigan": ("Lansing", ("Detroit", "Flint", "Kalamazoo", "Saginaw")),
    "Minnesota": ("Saint Paul", ("Minneapolis", "Duluth", "Mankato", "Bemidji")),
    "Mississippi": ("Jackson", ("Biloxi", "Gulfport", "Hattiesburg", "Tupelo")),
    "Missouri": ("Jefferson City", ("Joplin", "Branson", "Sedalia", "Hannibal")),
    "Montana": ("Helena", ("Billings", "Bozeman", "Missoula", "Kalispell")),
    "Nebraska": ("Lincoln", ("Omaha", "Kearney", "Ogallala", "Hastings")),
    "Nevada": ("Carson City", ("Reno", "Henderson", "Elko", "Sparks")),
    "New Hampshire": ("Concord", ("Nashua", "Keene", "Laconia", "Exeter")),
    "New Jersey": ("Trenton", ("Hoboken", "Camden", "Paterson", "Princeton")),
    "New Mexico": ("Santa Fe", ("Albuquerque", "Roswell", "Taos", "Gallup")),
    "New York": ("Albany", ("Buffalo", "Syracuse", "Yonkers", "Ithaca")),
    "North Carolina": ("Raleigh", ("Charlotte", "Durham", "Greensboro", "Asheville")),
    "North Dakota": ("Bismarck", ("Fargo", "Minot", "Williston", "Dickinson")),
    "Ohio": ("Columbus", ("Cleveland", "Cincinnati", "Toledo", "Akron")),
    "Oklahoma": ("Oklahoma City", ("Tulsa", "Stillwater", "Enid", "Lawton")),
    "Oregon": ("Salem", ("Eugene", "Corvallis", "Medford", "Astoria")),
    "Pennsylvania": ("Harrisburg", ("Philadelphia", "Pittsburgh", "Scranton", "Allentown")),
    "Rhode Island": ("Providence", ("Cranston", "Pawtucket", "Warwick", "Woonsocket")),
    "South Carolina": ("Columbia", ("Sumter", "Aiken", "Spartanburg", "Beaufort")),
    "South Dakota": ("Pierre", ("Brookings", "Deadwood", "Yankton", "Sturgis")),
    "Tennessee": ("Nashville", ("Memphis", "Knoxville", "Chattanooga", "Clarksville")),
    "Texas": ("Austin", ("Dallas", "Houston", "Lubbock", "Amarillo")),
    "Utah": ("Salt Lake City", ("Provo", "Ogden", "Moab", "Logan")),
    "Vermont": ("Montpelier", ("Burlington", "Rutland", "Brattleboro", "Stowe")),
    "Virginia": ("Richmond", ("Norfolk", "Roanoke", "Lynchburg", "Chesapeake")),
    "Washington": ("Olympia", ("Seattle", "Tacoma", "Spokane", "Yakima")),
    "West Virginia": ("Charleston", ("Huntington", "Wheeling", "Morgantown", "Parkersburg")),
    "Wisconsin": ("Madison", ("Milwaukee", "Oshkosh", "Kenosha", "Racine")),
    "Wyoming": ("Cheyenne", ("Laramie", "Casper", "Cody", "Gillette")),
}

CAPITALS: dict[str, str] = {state: capital for state, (capital, _) in STATES.items()}
CITIES: dict[str, str] = {city: state for state, (_, cities) in STATES.items() for city in cities}

# language: ((word, opposite), ...); each pair is asked in both directions
ANTONYMS: dict[str, tuple[tuple[str, str], ...]] = {
    "en": (
        *(
            ("big", "small"),
            ("fast", "slow"),
            ("hot", "cold"),
            ("high", "low"),
            ("long", "short"),
            ("old", "young"),
        ),
        *(
            ("rich", "poor"),
            ("full", "empty"),
            ("strong", "weak"),
            ("good", "bad"),
            ("open", "closed"),
            ("wet", "dry"),
        ),
    ),
    "fr": (
        *(("grand", "petit"), ("rapide", "lent"), ("chaud", "froid"), ("haut", "bas"), ("long", "court")),
        *(("vieux", "jeune"), ("riche", "pauvre"), ("plein", "vide"), ("fort", "faible"), ("bon", "mauvais")),
        *(("ouvert", "ferm\u00e9"), ("mouill\u00e9", "sec")),
    ),
    "de": (
        *(
            ("gro\u00df", "klein"),
            ("schnell", "langsam"),
            ("hei\u00df", "kalt"),
            ("hoch", "tief"),
            ("lang", "kurz"),
        ),
        *(("alt", "jung"), ("reich", "arm"), ("voll", "leer"), ("stark", "schwach"), ("gut", "schlecht")),
        *(("offen", "geschlossen"), ("nass", "trocken")),
    ),
    "es": (
        *(("grande", "peque\u00f1o"), ("r\u00e1pido", "lento"), ("caliente", "fr\u00edo"), ("alto", "bajo")),
        *(
            ("largo", "corto"),
            ("viejo", "joven"),
            ("rico", "pobre"),
            ("lleno", "vac\u00edo"),
            ("fuerte", "d\u00e9bil"),
        ),
        *(("bueno", "malo"), ("abierto", "cerrado"), ("mojado", "seco")),
    ),
    "it": (
        *(
            ("grande", "piccolo"),
            ("veloce", "lento"),
            ("caldo", "freddo"),
            ("alto", "basso"),
            ("lungo", "corto"),
        ),
        *(
            ("vecchio", "giovane"),
            ("ricco", "povero"),
            ("pieno", "vuoto"),
            ("forte", "debole"),
            ("buono", "cattivo"),
        ),
        *(("aperto", "chiuso"), ("bagnato", "asciutto")),
    ),
}
