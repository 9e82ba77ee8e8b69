"""The facts the demo model learns: the member states of the United Nations and the Vatican, and their capitals.

Where a state has several seats the one its government names as the capital, or else the executive one, is listed.
"""

from typing import NamedTuple

CAPITALS_BY_CONTINENT = {
    "Africa": """
        Algeria: Algiers
        Angola: Luanda
        Benin: Porto-Novo
        Botswana: Gaborone
        Burkina Faso: Ouagadougou
        Burundi: Gitega
        Cameroon: Yaoundé
        Cape Verde: Praia
        the Central African Republic: Bangui
        Chad: N'Djamena
        the Comoros: Moroni
        the Democratic Republic of the Congo: Kinshasa
        Djibouti: Djibouti
        Egypt: Cairo
        Equatorial Guinea: Malabo
        Eritrea: Asmara
        Eswatini: Mbabane
        Ethiopia: Addis Ababa
        Gabon: Libreville
        the Gambia: Banjul
        Ghana: Accra
        Guinea: Conakry
        Guinea-Bissau: Bissau
        Ivory Coast: Yamoussoukro
        Kenya: Nairobi
        Lesotho: Maseru
        Liberia: Monrovia
        Libya: Tripoli
        Madagascar: Antananarivo
        Malawi: Lilongwe
        Mali: Bamako
        Mauritania: Nouakchott
        Mauritius: Port Louis
        Morocco: Rabat
        Mozambique: Maputo
        Namibia: Windhoek
        Niger: Niamey
        Nigeria: Abuja
        the Republic of the Congo: Brazzaville
        Rwanda: Kigali
        São Tomé and Príncipe: São Tomé
        Senegal: Dakar
        the Seychelles: Victoria
        Sierra Leone: Freetown
        Somalia: Mogadishu
        South Africa: Pretoria
        South Sudan: Juba
        Sudan: Khartoum
        Tanzania: Dodoma
        Togo: Lomé
        Tunisia: Tunis
        Uganda: Kampala
        Zambia: Lusaka
        Zimbabwe: Harare
    """,
    "Asia": """
        Afghanistan: Kabul
        Armenia: Yerevan
        Azerbaijan: Baku
        Bahrain: Manama
        Bangladesh: Dhaka
        Bhutan: Thimphu
        Brunei: Bandar Seri Begawan
        Cambodia: Phnom Penh
        China: Beijing
        Cyprus: Nicosia
        East Timor: Dili
        Georgia: Tbilisi
        India: New Delhi
        Indonesia: Jakarta
        Iran: Tehran
        Iraq: Baghdad
        Israel: Jerusalem
        Japan: Tokyo
        Jordan: Amman
        Kazakhstan: Astana
        Kuwait: Kuwait City
        Kyrgyzstan: Bishkek
        Laos: Vientiane
        Lebanon: Beirut
        Malaysia: Kuala Lumpur
        the Maldives: Malé
        Mongolia: Ulaanbaatar
        Myanmar: Naypyidaw
        Nepal: Kathmandu
        North Korea: Pyongyang
        Oman: Muscat
        Pakistan: Islamabad
        the Philippines: Manila
        Qatar: Doha
        Saudi Arabia: Riyadh
        Singapore: Singapore
        South Korea: Seoul
        Sri Lanka: Sri Jayawardenepura Kotte
        Syria: Damascus
        Tajikistan: Dushanbe
        Thailand: Bangkok
        Turkey: Ankara
        Turkmenistan: Ashgabat
        the United Arab Emirates: Abu Dhabi
        Uzbekistan: Tashkent
        Vietnam: Hanoi
        Yemen: Sanaa
    """,
    "Europe": """
        Albania: Tirana
        Andorra: Andorra la Vella
        Austria: Vienna
        Belarus: Minsk
        Belgium: Brussels
        Bosnia and Herzegovina: Sarajevo
        Bulgaria: Sofia
        Croatia: Zagreb
        the Czech Republic: Prague
        Denmark: Copenhagen
        Estonia: Tallinn
        Finland: Helsinki
        France: Paris
        Germany: Berlin
        Greece: Athens
        Hungary: Budapest
        Iceland: Reykjavík
        Ireland: Dublin
        Italy: Rome
        Latvia: Riga
        Liechtenstein: Vaduz
        Lithuania: Vilnius
        Luxembourg: Luxembourg
        Malta: Valletta
        Moldova: Chișinău
        Monaco: Monaco
        Montenegro: Podgorica
        the Netherlands: Amsterdam
        North Macedonia: Skopje
        Norway: Oslo
        Poland: Warsaw
        Portugal: Lisbon
        Romania: Bucharest
        Russia: Moscow
        San Marino: San Marino
        Serbia: Belgrade
        Slovakia: Bratislava
        Slovenia: Ljubljana
        Spain: Madrid
        Sweden: Stockholm
        Switzerland: Bern
        Ukraine: Kyiv
        the United Kingdom: London
        Vatican City: Vatican City
    """,
    "North America": """
        Antigua and Barbuda: Saint John's
        the Bahamas: Nassau
        Barbados: Bridgetown
        Belize: Belmopan
        Canada: Ottawa
        Costa Rica: San José
        Cuba: Havana
        Dominica: Roseau
        the Dominican Republic: Santo Domingo
        El Salvador: San Salvador
        Grenada: Saint George's
        Guatemala: Guatemala City
        Haiti: Port-au-Prince
        Honduras: Tegucigalpa
        Jamaica: Kingston
        Mexico: Mexico City
        Nicaragua: Managua
        Panama: Panama City
        Saint Kitts and Nevis: Basseterre
        Saint Lucia: Castries
        Saint Vincent and the Grenadines: Kingstown
        Trinidad and Tobago: Port of Spain
        the United States: Washington, D.C.
    """,
    "Oceania": """
        Australia: Canberra
        Fiji: Suva
        Kiribati: South Tarawa
        the Marshall Islands: Majuro
        Micronesia: Palikir
        Nauru: Yaren
        New Zealand: Wellington
        Palau: Ngerulmud
        Papua New Guinea: Port Moresby
        Samoa: Apia
        the Solomon Islands: Honiara
        Tonga: Nuku'alofa
        Tuvalu: Funafuti
        Vanuatu: Port Vila
    """,
    "South America": """
        Argentina: Buenos Aires
        Bolivia: Sucre
        Brazil: Brasília
        Chile: Santiago
        Colombia: Bogotá
        Ecuador: Quito
        Guyana: Georgetown
        Paraguay: Asunción
        Peru: Lima
        Suriname: Paramaribo
        Uruguay: Montevideo
        Venezuela: Caracas
    """,
}

ALIASES = {
    "the United States": ("the USA", "the US", "the United States of America"),
    "the United Kingdom": ("the UK", "Great Britain"),
    "the United Arab Emirates": ("the UAE",),
    "the Czech Republic": ("Czechia",),
    "the Democratic Republic of the Congo": ("DR Congo",),
    "Ivory Coast": ("Côte d'Ivoire",),
    "East Timor": ("Timor-Leste",),
    "Turkey": ("Türkiye",),
    "Cape Verde": ("Cabo Verde",),
    "São Tomé and Príncipe": ("Sao Tome and Principe",),
    "the Netherlands": ("Holland",),
}


class Country(NamedTuple):
    """A state as it is named inside a sentence, with its article."""

    name: str  # "the Netherlands"
    capital: str
    continent: str

    @property
    def label(self) -> str:
        """The name as a field of a record: no article."""
        return self.name.removeprefix("the ")


def read(continent: str, table: str) -> list[Country]:
    """The countries of one block of the table above."""
    pairs = (line.strip().split(": ", 1) for line in table.strip().splitlines())
    return [Country(name, capital, continent) for name, capital in pairs]


COUNTRIES = tuple(country for continent, table in CAPITALS_BY_CONTINENT.items() for country in read(continent, table))
